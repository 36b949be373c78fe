"""On a GPU: Transformer Engine's layers and our own give the logits of transformers, in float32 and in bfloat16."""

from pathlib import Path

import pytest
import torch

from tests import hf_models
from tests.models.test_families import TOLERANCE, WITH_EXPERTS, mcore_logits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("variant", hf_models.variants())
def test_both_kinds_of_layers(variant: str, tmp_path: Path):
    directory = hf_models.save(variant, tmp_path, tokenizer=False)
    ids = hf_models.prompts()
    expected = hf_models.logits(directory, ids)
    for implementation in ("transformer_engine", "local"):
        fields = {"transformer_impl": implementation}
        exact = mcore_logits(directory, ids, **fields)
        torch.testing.assert_close(exact, expected, atol=TOLERANCE, rtol=0, msg=lambda m, i=implementation: f"{i}: {m}")
        rounded = mcore_logits(directory, ids, dtype=torch.bfloat16, **fields).float()
        cosine = torch.nn.functional.cosine_similarity(rounded, expected, dim=-1)
        if hf_models.VARIANTS[variant].family in WITH_EXPERTS:  # rounding sends some tokens to other experts
            assert cosine.median() > 0.99, f"{implementation}: {cosine.median()}"
        else:
            assert cosine.min() > 0.97, f"{implementation}: {cosine.min()}"
