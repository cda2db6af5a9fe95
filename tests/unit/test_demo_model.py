"""The demo model: repeatable, served with a real tokenizer and chat template, and refused politely."""

import pytest
from transformers import AutoTokenizer

from common.models.config import load_model_config
from deploy.demo_model import CORPUS, main, write_demo_model
from tests.support.reference import Reference, compare


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo_model(folder)
    return folder


def test_equal_seeds_give_equal_files(demo, tmp_path):
    write_demo_model(tmp_path / "same")
    names = sorted(path.name for path in demo.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "same").iterdir())
    for name in names:
        assert (tmp_path / "same" / name).read_bytes() == (demo / name).read_bytes(), name
    write_demo_model(tmp_path / "other", seed=1)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (demo / "model.safetensors").read_bytes()


def test_config_is_what_it_says(demo):
    config = load_model_config(demo)
    assert config.moe_layer_ids == (0, 2, 3)
    assert (config.num_experts, config.top_k, config.max_position_embeddings) == (16, 4, 4096)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    assert config.vocab_size == len(tokenizer) == 1000
    assert config.eos_token_ids == tuple(sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])))


@pytest.mark.parametrize("text", ["The lighthouse 🌊 at Malmö.\n\n  def f():\n\treturn 1", "日本語 \u0000 ẞ", " ", ""])
def test_every_text_survives_the_tokenizer(demo, text):
    tokenizer = AutoTokenizer.from_pretrained(demo)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text


def test_tokenizer_has_learnt_words(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo)
    text = CORPUS.read_text(encoding="utf-8")
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_chat_template_frames_each_turn(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert ids.count(tokenizer.eos_token_id) == 2


def test_routing_depends_on_the_whole_context(demo):
    tokens = AutoTokenizer.from_pretrained(demo).encode(CORPUS.read_text(encoding="utf-8"))[:200]
    changed = list(reversed(tokens[:100])) + tokens[100:]
    reference = Reference(demo)
    comparison = compare(reference.trace(tokens), reference.trace(changed).expert_ids[100:], start=100)
    assert comparison.differing_rows > 0.5 * comparison.num_rows


def test_command_writes_a_model(tmp_path, capsys):
    assert main([str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "config.json").exists()
    assert capsys.readouterr().out.strip() == str(tmp_path / "new")


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--help-me"]])
def test_command_says_how_it_is_used(arguments, capsys):
    assert main(arguments) == 2
    assert "usage" in capsys.readouterr().err


def test_command_does_not_overwrite(tmp_path, capsys):
    (tmp_path / "precious").touch()
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path / "precious")]) == 2
    assert "empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
