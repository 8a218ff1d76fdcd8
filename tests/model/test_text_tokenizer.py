import pytest

from omnimamba_model.text_tokenizer import WordTokenizer

WORDS = WordTokenizer.from_texts(["Which digit is this?", "a handwritten seven"])


def test_text_survives():
    ids = WORDS.encode("A handwritten seven, this?".replace(",", ""))
    assert WORDS.decode(ids) == "a handwritten seven this?"
    assert min(ids) >= 8 and max(ids) < WORDS.vocab_size == 8 + 8


def test_frame_tokens_are_not_words():
    assert WORDS.decode([0, *WORDS.encode("seven"), 1, 7, WORDS.vocab_size]) == "seven"


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match="never learned: eight, green$"):
        WORDS.encode("a green eight")


def test_survives_json():
    again = WordTokenizer.from_json(WORDS.to_json())
    assert (again.words, again.first) == (WORDS.words, WORDS.first)
    assert again.encode("which digit") == WORDS.encode("which digit")
    with pytest.raises(ValueError, match="kind must be 'words'"):
        WordTokenizer.from_json('{"model": {}}')
