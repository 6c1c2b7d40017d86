import json

from vitcls.checkpoints.saved import Saved


def test_what_is_saved_is_read_again():
    saved = Saved(
        lacks_score=True,
        data="abc",
        teacher="def",
        num_passes=2,
        seconds=1.5,
        images_per_second=20.0,
        window=[{"loss": 0.5}],
        skips={"in_row": 1, "total": 3},
        num_empty=4,
    )
    assert Saved.from_json(json.loads(json.dumps(saved.to_json()))) == saved


def test_checkpoints_of_earlier_versions_are_read():
    """They lack what was added since: scores still due, teachers, passes and empty steps."""
    old = {
        "data": "abc",
        "seconds": 1.5,
        "images_per_second": None,
        "window": [],
        "skips": {"in_row": 0, "total": 0},
    }
    saved = Saved.from_json(old)
    assert (saved.data, saved.seconds) == ("abc", 1.5)
    assert (saved.lacks_score, saved.teacher) == (False, None)
    assert (saved.num_passes, saved.num_empty) == (1, 0)


def test_fields_of_later_versions_are_left_out():
    assert Saved.from_json({"data": "abc", "added_later": 1}) == Saved(data="abc")
