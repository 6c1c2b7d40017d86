"""A plan as a text table."""

from typing import Any

from vitcls.plan.choices import Choice


def as_flags(fields: dict[str, Any]) -> str:
    """Returns config fields as flags of the command line."""
    return " ".join(f"--config.{name}={value}" for name, value in fields.items())


def format_plan(plan: dict[str, Any]) -> str:
    """Returns the figures of `planning.make_plan` as text."""
    step, devices = plan["step"], plan["num_devices"]
    choice = Choice(**plan["choice"])
    rows = plan["global_batch_size"] // devices
    lines = [
        f"{plan['network']} at {'x'.join(map(str, plan['image_size']))}, {plan['dtype']}: "
        f"{plan['num_parameters']:,} parameters, {plan['num_trained']:,} trained",
        f"{plan['topology']}: {devices} devices ({plan['chip']}) of {plan['num_hosts']} hosts",
        f"Batch of {plan['global_batch_size']}: {rows} images on each device; {choice.line()}",
        "",
    ]
    if plan["proposal"]:
        if plan["choice"] == plan["asked"]:
            lines += ["DOES NOT FIT as asked: evaluation."]
        else:
            needed = plan["bytes_asked"]
            lines += [
                f"DOES NOT FIT as asked ({Choice(**plan['asked']).line()}): "
                + (f"{needed / 1e9:.2f} GB" if needed else "more")
                + f" of {plan['bytes_usable'] / 1e9:.2f} GB."
            ]
        lines += [f"This fits: {as_flags(plan['proposal'])}", ""]
    lines += _memory_lines(plan)
    per_image = step["flops"] * devices / plan["global_batch_size"]
    lines += [
        f"{'one step, on each device':32}{'ms':>10}",
        f"{'  compute':32}{1e3 * step['compute_secs']:10.2f}   {step['flops'] / 1e12:.3f} TFLOP, "
        f"{per_image / 1e9:.1f} GFLOP an image",
        f"{'  memory':32}{1e3 * step['memory_secs']:10.2f}   "
        f"{step['bytes_accessed'] / 1e9:.2f} GB read and written",
        f"{'  exchange':32}{1e3 * step['exchange_secs']:10.2f}   "
        f"{step['bytes_exchanged'] / 1e6:.1f} MB",
        f"{'  at best, if they overlap':32}{1e3 * step['at_best_secs']:10.2f}",
        f"{'  if they do not':32}{1e3 * step['at_worst_secs']:10.2f}",
        "",
        *_collective_lines(plan["collectives"]),
        f"{plan['total_steps']} steps take {'at least' if plan['is_bound'] else 'about'} "
        f"{plan['hours']:.2f} hours, at "
        f"{plan['images_per_second']:.0f} images/s. For that every host must supply "
        f"{plan['images_per_second_and_host']:.0f} images/s "
        f"({plan['pixels_per_second_and_host'] / 1e6:.0f} MB/s of pixels).",
    ]
    return "\n".join(lines)


def _memory_lines(plan: dict[str, Any]) -> list[str]:
    usable = f"of {plan['bytes_usable'] / 1e9:.2f} usable"
    lines = [f"{'memory of each device':32}{'GB':>10}"]
    lines += [
        f"  {kind:30}{number / 1e9:10.3f}" for kind, number in plan["memory"].items() if number
    ]
    lines += [f"{'  in all, training':32}{sum(plan['memory'].values()) / 1e9:10.3f}   {usable}"]
    total = sum(plan["eval_memory"].values())
    return [*lines, f"{'  in all, evaluation':32}{total / 1e9:10.3f}   {usable}", ""]


def _collective_lines(collectives: list[dict[str, Any]]) -> list[str]:
    if not collectives:
        return []
    lines = [f"{'exchanges':22}{'type':>6}{'devices':>9}{'elements':>14}{'MB':>10}{'times':>7}"]
    lines += [
        f"  {one['kind']:20}{one['dtype']:>6}{one['devices']:>9}{one['elements']:>14,}"
        f"{one['bytes'] / 1e6:>10.2f}{one['times']:>7}"
        for one in collectives
    ]
    return [*lines, ""]
