"""Unknown names suggest the nearest one, or list all."""

from vitcls.errors import unknown


def test_the_nearest_name_is_suggested():
    message = str(unknown("fruit", "aple", ["pear", "apple"]))
    assert message == "Unknown fruit 'aple'. Did you mean 'apple'? Known: apple, pear."


def test_far_names_only_list_what_is_known():
    message = str(unknown("fruit", "zzz", ["pear", "apple"]))
    assert message == "Unknown fruit 'zzz'. Known: apple, pear."
