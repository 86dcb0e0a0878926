import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dvpo_service.data.dataset import load_prompts
from dvpo_service.data.encode import encode_prompts, text_ids
from dvpo_service.errors import ConfigError, DataError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
)


@pytest.fixture
def tokenizer():
    vocab = {c: i for i, c in enumerate("?0123456789+-=<>!")}
    words = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template=TEMPLATE)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "{p}", "answer": 1}}\n' for p in ("1+2=", "123456+2=", "3+4=")))
    return load_prompts([path], name="train")


def test_chat_template(data, tokenizer):
    encoded = encode_prompts(data, tokenizer, chat_template=True, max_prompt_tokens=12)
    assert tokenizer.decode(encoded.prompts[0].token_ids).replace(" ", "") == "<1+2=>!"
    assert all(type(i) is int for i in encoded.prompts[0].token_ids)
    assert encoded.prompts[1].token_ids[-1] == tokenizer.convert_tokens_to_ids("!")


def test_plain_text(data, tokenizer):
    encoded = encode_prompts(data, tokenizer, chat_template=False, max_prompt_tokens=12)
    assert encoded.prompts[0].token_ids == tuple(tokenizer.convert_tokens_to_ids(list("1+2=")))


def test_a_prompt_of_exactly_the_limit_is_kept(data, tokenizer):
    encoded = encode_prompts(data, tokenizer, chat_template=True, max_prompt_tokens=12)
    assert len(encoded.prompts[1].token_ids) == 12


def test_too_long(data, tokenizer):
    with pytest.raises(DataError, match=r"a\.jsonl:2: the prompt has 12 tokens, data\.max_prompt_tokens=11\."):
        encode_prompts(data, tokenizer, chat_template=True, max_prompt_tokens=11)
    encoded = encode_prompts(data, tokenizer, chat_template=True, max_prompt_tokens=11, on_bad_row="skip")
    assert [(p.index, p.messages[0]["content"]) for p in encoded.prompts] == [(0, "1+2="), (1, "3+4=")]
    assert encoded.skipped_by_reason == {"prompt too long": 1}
    assert encoded.origins == (data.origins[0], data.origins[2])
    assert data.skipped == 0
    with pytest.raises(DataError, match=r"train: no prompts are left; bad rows skipped: \{'prompt too long': 3\}"):
        encode_prompts(data, tokenizer, chat_template=True, max_prompt_tokens=1, on_bad_row="skip")


def test_no_tokens(data, tokenizer):
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the prompt has no tokens with this tokenizer"):
        encode_prompts(data, tokenizer, chat_template=True, max_prompt_tokens=11)


def test_template_is_missing_or_refuses(tmp_path, data, tokenizer):
    path = tmp_path / "b.jsonl"
    path.write_text(
        '{"prompt": [{"role": "system", "content": "1"}], "reward_model": {"ground_truth": 1}}\n'
        '{"prompt": [{"role": "user", "content": "1"}], "reward_model": {"ground_truth": 1}}\n'
    )
    verl = load_prompts([path], name="train")
    with pytest.raises(DataError, match=r"b\.jsonl:1: the chat template refuses the messages: no system turn"):
        encode_prompts(verl, tokenizer, chat_template=True, max_prompt_tokens=11)
    assert len(encode_prompts(verl, tokenizer, chat_template=True, max_prompt_tokens=9, on_bad_row="skip")) == 1
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template; set data\.chat_template=false"):
        encode_prompts(data, tokenizer, chat_template=True, max_prompt_tokens=11)


def test_what_a_template_or_a_tokenizer_raises_is_told(data, tokenizer):
    tokenizer.chat_template = "{{ 1 + messages[0].content }}"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the prompt cannot be tokenized: unsupported operand"):
        encode_prompts(data, tokenizer, chat_template=True, max_prompt_tokens=11)
    words = Tokenizer(models.WordLevel({"5": 0}, unk_token="?"))  # `?` itself is not in the vocabulary
    without = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(DataError, match=r"a\.jsonl:1: the prompt cannot be tokenized: WordLevel error"):
        encode_prompts(data, without, chat_template=False, max_prompt_tokens=11)


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        ("$A", "1+2="),
        ("> $A", ">1+2="),
        ("$A <", "1+2="),
        ("> $A <", ">1+2="),
        ("> $A < <", ">1+2="),
        ("< $A <", "<1+2="),  # BOS and EOS are one token, as GPT-2's
    ],
)
def test_a_plain_prompt_has_the_tokenizer_s_start_and_not_its_end(data, tokenizer, single, expected):
    ids = {c: tokenizer.convert_tokens_to_ids(c) for c in "<>"}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=list(ids.items()))
    tokenizer.eos_token = "<"
    encoded = encode_prompts(data, tokenizer, chat_template=False, max_prompt_tokens=12)
    assert encoded.prompts[0].token_ids == tuple(tokenizer.convert_tokens_to_ids(list(expected)))


def test_a_template_that_writes_its_own_start_gets_no_second_one(data, tokenizer):
    processor = TemplateProcessing(
        single="> $A <", special_tokens=[(c, tokenizer.convert_tokens_to_ids(c)) for c in "<>"]
    )
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.bos_token, tokenizer.eos_token = ">", "<"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}!"
    encoded = encode_prompts(data, tokenizer, chat_template=True, max_prompt_tokens=12)
    assert encoded.prompts[0].token_ids == tuple(tokenizer.convert_tokens_to_ids(list(">1+2=!")))


def test_a_template_that_ends_the_prompt_with_eos_is_refused(data, tokenizer):
    tokenizer.eos_token = "<"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: the chat template ends the prompt with '<'.*add_generation_prompt"
    ):
        encode_prompts(data, tokenizer, chat_template=True, max_prompt_tokens=12)


@pytest.mark.parametrize("text", ["", "7", "7+7=", "77"])
def test_text_that_repeats_its_own_tokens_is_cut_at_the_right_place(tokenizer, text):
    ids = [(c, tokenizer.convert_tokens_to_ids(c)) for c in "7<"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="7 $A <", special_tokens=ids)
    assert text_ids(text, tokenizer) == (tuple(tokenizer.convert_tokens_to_ids(list("7" + text))) if text else ())
