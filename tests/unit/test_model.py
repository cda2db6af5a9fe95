"""Our model against transformers' in float32: hidden states, logits and routing, through a paged pool."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from common.config import ModelOptions
from common.errors import CheckpointError
from common.kernels.attention import AttentionPlan
from common.kernels.torch_attention import TorchAttention
from common.kernels.torch_kernels import TorchKernels
from common.memory.kv_pool import KvPool
from common.memory.layout import KvLayout, num_pages_for
from common.models.config import ModelConfig, RopeConfig, load_model_config
from common.models.forward import ForwardBatch, MoeModel
from common.models.layers.rotary import rotary_tables
from common.models.registry import build_model, resolve_dtype
from tests.support.checkpoints import SHAPES, make_checkpoint
from tests.support.reference import Comparison, Difference, Reference, Trace, compare

CPU = torch.device("cpu")
NUM_TOKENS = 70


@dataclass
class Sink:
    """Takes what one step routes, in the order of the MoE layers."""

    top_k: int
    ids: list[torch.Tensor] = field(default_factory=list)

    def target(self, moe_layer: int, num_tokens: int) -> torch.Tensor:
        assert moe_layer == len(self.ids)
        self.ids.append(torch.full((num_tokens, self.top_k), -1))
        return self.ids[-1]


@dataclass
class Case:
    """One checkpoint, loaded by us and by transformers."""

    config: ModelConfig
    model: MoeModel
    reference: Reference


class PagedRun:
    """Feeds sequences through a pool whose pages are dealt out in random order, and gathers what each position gave."""

    def __init__(self, case: Case, page_size: int, sequences: list[list[int]]) -> None:
        config = case.config
        layout = KvLayout(
            page_size=page_size,
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype="float32",
            itemsize_bytes=4,
        )
        needs = [num_pages_for(len(sequence), layout.page_size) for sequence in sequences]
        self.pool = KvPool(layout, sum(needs) + 2, CPU, torch.float32)
        self.pool.pages.fill_(torch.nan)
        shuffled = torch.randperm(self.pool.num_pages, generator=torch.Generator().manual_seed(7))
        self.pages = list(shuffled[: sum(needs)].split(needs))
        self.model, self.page_size, self.sequences, self.top_k = case.model, page_size, sequences, config.top_k
        self.hidden: list[list[torch.Tensor]] = [[] for _ in sequences]
        self.rows: list[list[torch.Tensor]] = [[] for _ in sequences]

    def step(self, ranges: dict[int, tuple[int, int]]) -> None:
        """Run `[start, stop)` of each named sequence in one batch."""
        tokens, positions, slots, query_starts, page_starts = [], [], [], [0], [0]
        for index, (start, stop) in ranges.items():
            span = torch.arange(start, stop)
            tokens += self.sequences[index][start:stop]
            positions.append(span)
            slots.append(self.pages[index][span // self.page_size] * self.page_size + span % self.page_size)
            query_starts.append(query_starts[-1] + stop - start)
            page_starts.append(page_starts[-1] + -(-stop // self.page_size))
        pages = [self.pages[index][: -(-stop // self.page_size)] for index, (_, stop) in ranges.items()]
        contexts = [stop for _, stop in ranges.values()]
        plan = AttentionPlan(
            *(
                np.array(array, dtype=np.int32)
                for array in (query_starts, contexts, page_starts, torch.cat(pages).numpy())
            )
        )
        sink = Sink(self.top_k)
        attention = TorchAttention().plan(plan, torch.from_numpy)
        batch = ForwardBatch(torch.tensor(tokens), torch.cat(positions), torch.cat(slots), attention, sink)
        hidden = self.model(batch, self.pool)
        rows = torch.stack(sink.ids, dim=1)
        for i, index in enumerate(ranges):
            self.hidden[index].append(hidden[query_starts[i] : query_starts[i + 1]])
            self.rows[index].append(rows[query_starts[i] : query_starts[i + 1]])

    def check(self, case: Case, index: int) -> None:
        """Compare one sequence's logits and rows with the reference's."""
        trace = case.reference.trace(self.sequences[index])
        assert_same_routing(compare(trace, torch.cat(self.rows[index]).numpy()))
        logits = case.model.logits(torch.cat(self.hidden[index]))
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, torch.from_numpy(trace.logits), atol=1e-4, rtol=1e-4)


def assert_same_routing(comparison: Comparison) -> None:
    assert comparison.num_rows > 0
    assert comparison.differing_rows == 0 or comparison.is_tie, comparison


def some_tokens(seed: int, count: int = NUM_TOKENS) -> list[int]:
    return np.random.default_rng(seed).integers(3, 1000, count).tolist()


@pytest.fixture(scope="session")
def cases(tmp_path_factory) -> dict[str, Case]:
    torch.set_num_threads(1)
    loaded = {}
    for shape in SHAPES:
        folder = make_checkpoint(tmp_path_factory.mktemp(shape), shape)
        config = load_model_config(folder)
        loaded[shape] = Case(
            config, build_model(config, ModelOptions(model=str(folder)), CPU, TorchKernels()), Reference(folder)
        )
    return loaded


@pytest.fixture(params=list(SHAPES))
def case(request, cases) -> Case:
    return cases[request.param]


@pytest.mark.parametrize("page_size", [1, 16])
def test_whole_prompt(case, page_size):
    run = PagedRun(case, page_size, [some_tokens(0)])
    run.step({0: (0, NUM_TOKENS)})
    run.check(case, 0)


@pytest.mark.parametrize("page_size", [1, 16])
def test_chunks_and_single_tokens(case, page_size):
    run = PagedRun(case, page_size, [some_tokens(1)])
    for start, stop in [(0, 16), (16, 17), (17, 50), (50, 64), *((at, at + 1) for at in range(64, NUM_TOKENS))]:
        run.step({0: (start, stop)})
    run.check(case, 0)


@pytest.mark.parametrize("page_size", [1, 16])
def test_requests_that_share_steps(case, page_size):
    """A prompt in chunks, one that joins later, and one that already decodes."""
    run = PagedRun(case, page_size, [some_tokens(2), some_tokens(3, 33), some_tokens(4, 20)])
    run.step({0: (0, 40), 2: (0, 16)})
    run.step({2: (16, 17), 0: (40, 60), 1: (0, 31)})
    run.step({0: (60, 61), 1: (31, 32), 2: (17, 18)})
    run.step({1: (32, 33), 2: (18, 20), 0: (61, NUM_TOKENS)})
    for index in range(3):
        run.check(case, index)


def test_hidden_states_are_those_before_the_head(case):
    tokens = some_tokens(5)
    run = PagedRun(case, 16, [tokens])
    run.step({0: (0, NUM_TOKENS)})
    with torch.inference_mode():
        theirs = case.reference._model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    torch.testing.assert_close(run.hidden[0][0], theirs, atol=1e-4, rtol=1e-4)


def test_greedy_tokens_are_the_reference_s(case):
    prompt, num_new = some_tokens(6, 30), 12
    expected = case.reference.generate(prompt, num_new)
    assert len(expected) == num_new
    run = PagedRun(case, 16, [[*prompt, *expected]])
    run.step({0: (0, 30)})
    for at in range(30, 30 + num_new - 1):
        assert int(case.model.logits(run.hidden[0][-1][-1:]).argmax()) == expected[at - 30]
        run.step({0: (at, at + 1)})
    assert (
        case.reference.generate(prompt, num_new, eos_ids={expected[3]}) == expected[: expected.index(expected[3]) + 1]
    )


def test_routing_depends_on_the_whole_context(case):
    """A checkpoint whose rows hardly change with the context could not show a stale or shifted row."""
    tokens, half = some_tokens(7), NUM_TOKENS // 2
    other = some_tokens(8, half) + tokens[half:]
    comparison = compare(case.reference.trace(tokens), case.reference.trace(other).expert_ids[half:], start=half)
    assert comparison.differing_rows > 0.5 * comparison.num_rows


def test_parameters_are_not_trained(case):
    assert not any(parameter.requires_grad for parameter in case.model.parameters())


def test_context_longer_than_the_checkpoint_s(cases):
    config = cases["plain"].config
    options = ModelOptions(model="unused", load_format="dummy", context_tokens=config.max_position_embeddings + 5)
    assert len(build_model(config, options, CPU, TorchKernels()).cos_Pd) == options.context_tokens


def test_dtype_is_the_option_s_or_the_checkpoint_s(cases):
    config = cases["plain"].config
    assert resolve_dtype(config, ModelOptions(model="m")) == torch.float32
    assert resolve_dtype(config, ModelOptions(model="m", dtype="bfloat16")) == torch.bfloat16
    nameless = ModelConfig(**{name: getattr(config, name) for name in config.__struct_fields__} | {"dtype": None})
    with pytest.raises(CheckpointError, match="--dtype"):
        resolve_dtype(nameless, ModelOptions(model="m"))


@pytest.mark.parametrize(
    ("rope_type", "options"),
    [
        ("default", {}),
        ("linear", {"factor": 2.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 256}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 256, "attention_factor": 1.5, "beta_fast": 16}),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_are_transformers(cases, rope_type, options, dtype):
    plain = cases["plain"].config
    rope = RopeConfig(type=rope_type, theta=1e6, options=options)
    config = ModelConfig(**{name: getattr(plain, name) for name in plain.__struct_fields__} | {"rope": rope})
    theirs = Qwen3MoeRotaryEmbedding(
        Qwen3MoeConfig(
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": rope_type, "rope_theta": 1e6, **options},
        )
    )
    cos, sin = theirs(torch.empty(0, dtype=dtype), torch.arange(1024)[None])
    our_cos, our_sin = rotary_tables(config, 1024, CPU, dtype)
    assert torch.equal(our_cos, cos[0])
    assert torch.equal(our_sin, sin[0])


# ------------------------------------------------------------------------------------------------ the judge itself


def small_trace() -> Trace:
    """Three positions, two layers, five experts, top two; experts 1 and 2 are a tie at position 1, layer 0."""
    router_logits = np.tile(np.array([4.0, 3.0, 2.0, 1.0, 0.0], dtype=np.float32), (3, 2, 1))
    router_logits[1, 0, 2] = 3.0 - 1e-5
    return Trace(np.zeros((3, 9), np.float32), router_logits, np.tile(np.array([0, 1]), (3, 2, 1)))


def test_equal_rows_compare_equal():
    trace = small_trace()
    comparison = compare(trace, trace.expert_ids[1:].astype(np.uint8), start=1)
    assert comparison == Comparison(4, 0, 0, None, False)


def test_another_order_is_not_a_difference():
    trace = small_trace()
    comparison = compare(trace, trace.expert_ids[..., ::-1])
    assert (comparison.differing_rows, comparison.order_differs) == (0, 6)


@pytest.mark.parametrize(
    ("position", "layer", "ids", "is_tie"),
    [
        (1, 0, [0, 2], True),
        (1, 0, [2, 0], True),
        (1, 0, [0, 3], False),
        (1, 0, [2, 3], False),
        (1, 1, [0, 2], False),
        (1, 0, [0, 9], False),
        (1, 0, [0, 0], False),
    ],
)
def test_only_a_swap_of_equal_logits_is_a_tie(position, layer, ids, is_tie):
    trace = small_trace()
    rows = trace.expert_ids.copy()
    rows[position, layer] = ids
    rows[2, 1] = [3, 4]
    comparison = compare(trace, rows[1:], start=1)
    assert comparison.differing_rows == 2
    assert comparison.first_difference == Difference(position, layer, (0, 1), tuple(ids))
    assert comparison.is_tie == is_tie


@pytest.mark.parametrize(("shape", "start"), [((3, 2, 2), 1), ((3, 1, 2), 0), ((3, 2), 0), ((2, 2, 2), -2)])
def test_rows_that_do_not_fit_are_refused(shape, start):
    with pytest.raises(ValueError, match="do not fit"):
        compare(small_trace(), np.zeros(shape, np.int64), start=start)
