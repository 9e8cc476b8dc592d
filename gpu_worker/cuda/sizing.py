"""How many bytes the page pool may take on a GPU. Integers only."""


def pool_bytes(free_bytes: int, peak_bytes: int, share: float) -> int:
    """`share` of what is free once the weights are loaded, less what the largest step needs beside them.

    free_bytes: after loading, with nothing but weights on the device. peak_bytes: what a step of the largest size
    allocated beyond the weights. Raises ValueError with the numbers when nothing is left.
    """
    left = int(free_bytes * share) - peak_bytes
    if left <= 0:
        raise ValueError(
            f"{share:.0%} of {free_bytes} free bytes is not more than the {peak_bytes} that the largest step needs: "
            "nothing is left for the page pool"
        )
    return left
