"""The goals for an H200, each beside the figure that it is about."""


def at_most(name: str, figure: float, goal: float) -> dict[str, object]:
    return {name: round(figure, 4), "goal": f"{name} <= {goal}", "reached": figure <= goal}


def at_least(name: str, figure: float, goal: float) -> dict[str, object]:
    return {name: round(figure, 4), "goal": f"{name} >= {goal}", "reached": figure >= goal}
