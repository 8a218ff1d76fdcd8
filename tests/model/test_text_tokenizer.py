import pytest

from omnimamba_model.text_tokenizer import SPECIAL, BpeTokenizer, WordTokenizer, lacks_additions

WORDS = WordTokenizer.of_texts(["Which digit is this?", "a handwritten seven"])


def test_text_survives_but_for_case_and_marks():
    ids = WORDS.encode("A handwritten  seven, this?")
    assert WORDS.decode(ids) == "a handwritten seven this"
    assert min(ids) >= 8 and max(ids) < WORDS.vocab_size == 8 + 7


def test_frame_tokens_are_not_words():
    frame = list(vars(SPECIAL).values())
    assert sorted(frame) == list(range(8))
    assert WORDS.decode([*frame[:4], *WORDS.encode("seven"), *frame[4:]]) == "seven"


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match="got green, eight in 'a green eight', expected words of a, digit"):
        WORDS.encode("a green eight")
    with pytest.raises(ValueError, match="must contain a word, got '[?]!'"):
        WORDS.encode("?!")


def test_survives_json():
    again = WordTokenizer.from_json(WORDS.to_json())
    assert again.words == WORDS.words
    assert again.encode("which digit") == WORDS.encode("which digit")


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "9" * 5000, "[]", '{"model": {}}', '{"type": "words", "words": [3]}']
)
def test_other_tokenizers_are_refused(text):
    with pytest.raises(ValueError, match="tokenizer.json"):
        WordTokenizer.from_json(text)


def test_gpt_neoxs_own_is_known_by_where_it_ends():
    tokenizers = pytest.importorskip("tokenizers")

    def of(count):
        return tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))

    assert lacks_additions(of(50277).to_str())
    assert not lacks_additions(of(50276).to_str()) and not lacks_additions(of(50287).to_str())
    assert not lacks_additions(BpeTokenizer.trained(["a cat"], 300).to_json())
    words = WordTokenizer(f"w{i}" for i in range(50277 - 8))
    assert words.vocab_size == 50277 and not lacks_additions(words.to_json())
    assert not lacks_additions("{")
