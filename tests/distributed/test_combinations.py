"""Three hundred random combinations of layout, switches and microbatches train as one process does, or are refused.

hypothesis draws them from a fixed seed, so they are the same everywhere; the first thirty are in `make test`, all of
them in `make test-nightly`. A combination that the configuration refuses must be refused before a process is started.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from megatron_kosmos.config import ConfigError
from tests.distributed.test_layouts import assert_same
from tests.distributed.tiny import LATENTS, frozen_vision, tiny_run
from tests.distributed.training import train_in_ranks

pytestmark = pytest.mark.distributed

NUM_DAILY, NUM_NIGHTLY = 30, 300
RESAMPLERS: dict[str, dict[str, Any]] = {
    "perceiver": {"kind": "perceiver", "depth": 2, "num_latents": LATENTS, "num_heads": 2, "head_size": 8},
    "cross_attention": {"kind": "cross_attention", "num_latents": LATENTS, "num_heads": 4, "attention_dropout": 0.0},
}
FROZEN: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "trunk": frozen_vision(1),
    "tower": [{"parameters": ["vision_tower.*"], "frozen": True}],
    "decoder": [{"parameters": ["decoder.*", "embedding.*"], "frozen": True}],
    "input": [{"parameters": ["vision_tower.*", "resampler.*", "embedding.*"], "frozen": True}],
    "matrices": [
        {"parameters": ["*.bias", "*norm*"], "learning_rate_scale": 2.0},
        {"parameters": ["*"], "frozen": True},
    ],
}


@dataclass(frozen=True)
class Combination:
    """One draw."""

    world_size: int
    layout: dict[str, Any]
    switches: dict[str, Any]
    frozen: str
    recompute: str
    pattern: str

    def changes(self) -> dict[str, Any]:
        """Return what makes the tiny run this one."""
        return self.common() | {
            "training__recompute": self.recompute,
            **{f"parallel__{key}": value for key, value in self.layout.items()},
        }

    def common(self) -> dict[str, Any]:
        """Return what must not depend on the layout."""
        return self.switches | {"optimizer__groups": FROZEN[self.frozen], "optimizer__learning_rate": 1e-3}

    def describe(self) -> str:
        """Return what stands in the test's name."""
        layout = "_".join(f"{key.split('_')[0]}{value}" for key, value in self.layout.items())
        return f"{self.world_size}ranks_{layout}_{self.frozen}_frozen"


@st.composite
def combinations(draw: st.DrawFn) -> Combination:
    """Draw a combination; most are legal."""
    tensor, pipeline, virtual, data = draw(
        st.sampled_from(
            [
                *((tp, 1, 1, dp) for tp in (1, 2, 4) for dp in (1, 2) if tp * dp <= 4),
                *((tp, 2, vp, dp) for tp in (1, 2) for vp in (1, 2) for dp in (1, 2) if 2 * tp * dp <= 4),
                (1, 4, 1, 1),
            ]
        )
    )
    layout = {
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "virtual_pipeline_parallel_size": virtual,
        "sequence_parallel": draw(st.booleans()) if tensor > 1 else draw(st.sampled_from([False] * 9 + [True])),
        "zero_stage": draw(st.sampled_from([0, 1, 2, 3] if pipeline == 1 else [0, 1, 1, 1, 1, 2])),
        "batch_p2p": draw(st.sampled_from([False, True]))
        if virtual == 1
        else draw(st.sampled_from([False] * 9 + [True])),
    }
    switches = {
        "model__decoder__xpos": draw(st.booleans()),
        "model__decoder__positions": draw(st.sampled_from(["none", "learned", "sinusoidal"])),
        "model__decoder__scale_embeddings": draw(st.booleans()),
        "model__decoder__query_key_norm": draw(st.booleans()),
        "model__decoder__tie_embeddings": draw(st.booleans()),
        "model__decoder__num_query_groups": draw(st.sampled_from([None, 1, 2, 4, 3])),
        "model__vision__activation": draw(st.sampled_from(["quick_gelu", "gelu"])),
        "model__vision__features": draw(st.sampled_from(["hidden", "normalized"])),
        "model__resampler": RESAMPLERS[draw(st.sampled_from(sorted(RESAMPLERS)))],
        "kernels__attention": draw(st.sampled_from(["auto", "sdpa", "unfused"])),
    }
    kinds = st.text("timd", min_size=4, max_size=4)
    return Combination(
        world_size=tensor * pipeline * data,
        layout=layout,
        switches=switches,
        frozen=draw(st.sampled_from(sorted(FROZEN))),
        recompute=draw(st.sampled_from(["none", "full"])),
        pattern=f"{draw(kinds)} {draw(kinds)}",
    )


def drawn() -> list[Combination]:
    """Return different combinations, always the same ones, in an order that says nothing."""
    found: dict[str, Combination] = {}

    @seed(230214045)
    @settings(
        max_examples=3 * NUM_NIGHTLY,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(combinations())
    def collect(combination: Combination) -> None:
        found.setdefault(repr(combination), combination)

    collect()
    # hypothesis draws many neighbours one after the other.
    return Random(0).sample(list(found.values()), len(found))


def is_refused(combination: Combination) -> bool:
    """Whether the configuration refuses the combination, before anything is started."""
    try:
        tiny_run(**combination.changes()).data_parallel_size(combination.world_size)
    except ConfigError:
        return True
    return False


COMBINATIONS = drawn()
LEGAL = [combination for combination in COMBINATIONS if not is_refused(combination)][:NUM_NIGHTLY]
REFUSED = [combination for combination in COMBINATIONS if is_refused(combination)]


@pytest.mark.parametrize(
    "combination",
    [
        pytest.param(
            combination,
            id=f"{number:03d}_{combination.describe()}",
            marks=[pytest.mark.nightly] if number >= NUM_DAILY else [],
        )
        for number, combination in enumerate(LEGAL)
    ],
)
def test_a_combination_trains_as_one_process_does(combination: Combination) -> None:
    reference = train_in_ranks(1, combination.pattern, 2, parallel__zero_stage=0, **combination.common())
    assert_same(train_in_ranks(combination.world_size, combination.pattern, 2, **combination.changes()), reference)


REASONS = {
    "sequence_parallel=true needs tensor_parallel_size": lambda c: c.layout["tensor_parallel_size"] == 1,
    "frees gradients that the pipeline schedule": lambda c: c.layout["pipeline_parallel_size"] > 1,
    "batch_p2p=true with virtual_pipeline_parallel_size": lambda c: c.layout["virtual_pipeline_parallel_size"] > 1,
    "is not a multiple of num_query_groups=3": lambda c: c.switches["model__decoder__num_query_groups"] == 3,
}
"""What may be wrong with a draw, by what the message says."""


def test_what_is_refused_is_refused_for_a_reason_that_holds() -> None:
    assert len(LEGAL) == NUM_NIGHTLY
    assert len(REFUSED) > NUM_NIGHTLY / 10
    seen = set()
    for combination in REFUSED:
        with pytest.raises(ConfigError) as caught:
            tiny_run(**combination.changes()).data_parallel_size(combination.world_size)
        reasons = [text for text, holds in REASONS.items() if text in str(caught.value) and holds(combination)]
        assert reasons, caught.value
        seen.update(reasons)
    assert seen == REASONS.keys()
