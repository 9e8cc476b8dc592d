from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from adapter_store.dtypes import convert

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def as_torch(bits: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(TORCH[dtype])


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
def test_a_conversion_rounds_as_torch_does(source: str, target: str) -> None:
    random = torch.Generator().manual_seed(0)
    values = (torch.randn(1000, generator=random) * 10.0 ** torch.randint(-8, 4, (1000,), generator=random)).to(
        TORCH[source]
    )
    bits = values.view(torch.uint16).numpy() if source == "bfloat16" else values.numpy()
    assert torch.equal(as_torch(convert(bits, source, target), target), values.to(TORCH[target]))


@pytest.mark.parametrize(("value", "target"), [(70000.0, "float16"), (3.4e38, "bfloat16")])
def test_a_value_too_large_for_the_dtype_is_an_error(value: float, target: str) -> None:
    with pytest.raises(ValueError, match=f"too large for {target}"):
        convert(np.array([1.0, value], np.float32), "float32", target)
