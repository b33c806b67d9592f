"""Compares two configurations, given as dicts."""


def config_diff(saved: dict, given: dict, path: str, origin: str) -> list[str]:
    """Returns a text for each differing field: "steps is 30 in the run, 60 in the config".

    Args:
      saved: The configuration of a run or checkpoint.
      given: The configuration that the user gives.
      path: Name that comes before each field's, or "".
      origin: Where `saved` is from, as in "in the ...".
    """
    differences = []
    for name in saved | given:
        old, new = saved.get(name), given.get(name)
        field = f"{path}.{name}" if path else name
        if isinstance(old, dict) and isinstance(new, dict):
            differences += config_diff(old, new, field, origin)
        elif old != new:
            differences.append(f"{field} is {old!r} in the {origin}, {new!r} in the config")
    return differences
