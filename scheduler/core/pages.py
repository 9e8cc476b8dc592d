"""How many pages a set of sequences needs at its peak."""

from collections.abc import Iterable


def peak_pages(sequences: Iterable[tuple[int, int]], page_size: int) -> int:
    """Pages that `(held, coming)` sequences need when each adds one token a step and frees all after its last.

    `held` and `coming` are tokens, `page_size` tokens a page. The peak estimate of LightLLM and S-LoRA (Sheng et al.
    2023, section 5), exact in pages: pages only grow between two ends, so the peak is just before one of them. With
    the sequences sorted by falling `coming` l, the first i are alive when number i ends, and need
    sum over k <= i of ceil((c_k + l_i) / page_size). Counting the residues of c makes that O(page_size) for each i.
    """
    # How many of the first i sequences have (held - 1) mod page_size == residue.
    residues = [0] * page_size
    full_pages = peak = 0
    for alive, (coming, held) in enumerate(sorted(((c, h) for h, c in sequences), reverse=True), 1):
        quotient, residue = divmod(held - 1, page_size)
        full_pages += quotient
        residues[residue] += 1
        new_pages, rest = divmod(coming, page_size)
        crossing = sum(residues[page_size - rest :])
        peak = max(peak, full_pages + alive * (new_pages + 1) + crossing)
    return peak
