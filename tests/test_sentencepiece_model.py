"""flux_lab.sentencepiece_model reads what the library sentencepiece writes."""

import io

import pytest
import sentencepiece

from flux_lab import data_dir
from flux_lab.sentencepiece_model import NORMAL, read_sentencepiece_model

TEXTS = [f"a {color} {shape} on {floor}" for color in ("red", "blue") for shape in ("cube", "cone") for floor in ("grass", "sand", "wood")]


def write_model(path, model_type):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=40, model_type=model_type, hard_vocab_limit=False, minloglevel=2
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def unigram(tmp_path):
    return write_model(tmp_path / "spiece.model", "unigram")


def assert_as_the_library_reads_it(path):
    ours, library = read_sentencepiece_model(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [piece.text for piece in ours.pieces] == [library.id_to_piece(index) for index in range(len(library))]
    assert [piece.score for piece in ours.pieces] == [library.get_score(index) for index in range(len(library))]
    assert [piece.type != NORMAL for piece in ours.pieces] == [
        library.is_control(index) or library.is_unknown(index) or library.is_byte(index) or library.is_unused(index)
        for index in range(len(library))
    ]
    return ours


def test_pieces_scores_and_types(unigram):
    assert assert_as_the_library_reads_it(unigram).charsmap


def test_the_miniatures():
    assert_as_the_library_reads_it(data_dir() / "flux-mini" / "tokenizer_2" / "spiece.model")


def test_wrong_files(unigram, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.model is missing"):
        read_sentencepiece_model(tmp_path / "nothing.model")
    (tmp_path / "cut.model").write_bytes(unigram.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"cut\.model: not a sentencepiece model"):
        read_sentencepiece_model(tmp_path / "cut.model")
    (tmp_path / "text.model").write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"text\.model: not a sentencepiece model"):
        read_sentencepiece_model(tmp_path / "text.model")
    with pytest.raises(ValueError, match=r"bpe\.model: expected a unigram model, got model type 2"):
        read_sentencepiece_model(write_model(tmp_path / "bpe.model", "bpe"))
