"""Stage 2: the miniature's two vocabularies, trained on the captions, in the files of a FLUX checkpoint.

    python -m flux_lab.training.tokenizers --scenes runs/scenes --out runs/tokenizers

`tokenizer/` is a byte-level BPE laid out as CLIP's: 256 byte symbols, the same 256 at the end of a word, one token for each merge,
start, end; the end token has the highest id. `tokenizer_2/` is a unigram vocabulary laid out as T5's: pad 0, end 1, unknown 2, pieces by
falling probability, then the sentinels `<extra_id_*>` in falling order. Both are read by transformers' CLIPTokenizer and T5TokenizerFast.
"""

import argparse
import io
import itertools
import json
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm

from flux_lab.files import replacing
from flux_lab.training.scenes import read_captions

CLIP_LENGTH, T5_LENGTH = 77, 32
CLIP_SIZE, T5_SIZE = 1000, 500
SENTINELS = 12  # T5 has 100 behind its 32,000 pieces
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SEEDS, LONGEST = 4000, 16  # pieces to begin with, and their greatest length
MARK = "▁"  # a space, in sentencepiece's spelling
EVERYDAY_WEIGHT = 20  # times that each everyday word is read

# Words that people try although no caption has them: they give both vocabularies pieces of English beyond the captions' few words.
EVERYDAY = """
able above across after again air all alone along also always among animal another any apple arm around art artist autumn away baby back
background bag bear beautiful bed bee before below bench best better between bicycle bird blossom boat body book bottle bottom bowl boy
branch bread bridge bright brown brush building bus butterfly button cake camera candle candy car card cartoon castle cat center ceramic
chair child chocolate circle city clay clean clear close cloth cloud coat coffee cold color colorful cook corner cotton country cow cream
crystal cube cup curtain cute day deep deer design desk detailed diamond dinner dirty dish dog door down dragon drawing dream dress dry
duck each early earth edge egg eight elephant empty evening every eye face fall family fantasy far farm fast father field fine finger fire
first fish five flag flat floating flower fly flying food foot forest four fox fresh friend frog front fruit full funny garden gentle giant
girl glass golden good grain grape great ground group hair half hand hanging happy hard hat head heart heavy helmet high highly hill holding
home horse hot house hundred ice inside island jar jumping kitchen knight lake lamp landscape leaf leather lemon letter light line lion long
looking lovely low machine made magic man many marble market melting middle mirror modern monkey moon more morning mother mountain mouse
mouth music near neon nest never new nice nine noon north nothing number ocean oil old one open orange other outside over owl painting panda
paper park party path pattern pencil people perfect person phone photograph photography piano pink plane planet plant plastic plate playing
pond poster pot pretty pumpkin puppy purse pyramid quiet rabbit rain rainbow reading realistic resting rice ring river road robot rock roof
room rope rose rough round rubber running sad sailing sand scene school sea seven shadow shape sharp sheep shell ship shirt shoe shop short
side silver simple single sitting six sky sleeping slow smiling smoke smooth snow soft some song south space square standing star steel
stone street strong studio style summer sun sunlight sunny sunset surface sweet swimming table tall teacher ten tennis texture thick thin
thousand three tiger time top tower town toy traffic train transparent tree triangle truck turtle two umbrella under up vase vegetable
vintage walking wall warm watch water wave wearing weather west wet wheel wide wild wind window wine winter without woman wonderful world
writing year yellow young zebra zero
"""


def byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes, in CLIP's order: printable bytes first, as themselves, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = range(256 - len(printable))
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in others]


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, cleaned and split as CLIP does it, its bytes spelled as symbols."""
    clean = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    split = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return Counter(word for text in texts for word, _ in split.pre_tokenize_str(clean.normalize_str(text)))


def merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The symbols of a word with every occurrence of `pair`, from the left, made one."""
    merged, index = [], 0
    while index < len(symbols):
        step = 2 if symbols[index : index + 2] == pair else 1
        merged.append("".join(symbols[index : index + step]))
        index += step
    return tuple(merged)


def train_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: `count` times, the most frequent pair of neighbours becomes one symbol; of equals, the first by spelling.

    There are fewer merges when every word has become one symbol before. (The trainer of `tokenizers` breaks ties at random.)
    """
    words = {(*word[:-1], word[-1] + "</w>"): number for word, number in count_words(texts).items()}
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for symbols, number in words.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += number
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {merge(symbols, best): number for symbols, number in words.items()}
    return merges


def clip_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    symbols = byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + [left + right for left, right in merges] + [START, END]
    return {token: index for index, token in enumerate(tokens)}


def special(token: str, normalized: bool = False) -> dict:
    return {"content": token, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_clip(folder: Path, texts: Iterable[str], size: int = CLIP_SIZE) -> int:
    """Train CLIP's kind of tokenizer and write its files; returns the size of the vocabulary."""
    merges = train_merges(texts, size - 512 - 2)
    vocabulary = clip_vocabulary(merges)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    named = {role: special(token, normalized=True) for role, token in (("bos_token", START), ("eos_token", END), ("unk_token", END))}
    write_json(folder / "special_tokens_map.json", named | {"pad_token": END})
    added = {str(vocabulary[token]): special(token, normalized=True) | {"special": True} for token in (START, END)}
    settings = {"add_prefix_space": False, "added_tokens_decoder": added, "clean_up_tokenization_spaces": True, "do_lower_case": True}
    settings |= {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END, "errors": "replace"}
    write_json(folder / "tokenizer_config.json", settings | {"model_max_length": CLIP_LENGTH, "tokenizer_class": "CLIPTokenizer"})
    return len(vocabulary)


def write_seeds(path: Path, texts: Iterable[str]) -> None:
    """The substrings of all words with how often they occur, for the unigram model to choose from.

    sentencepiece's own search counts a substring once for each *different* word, which misses frequent words in so small a language.
    """
    words = Counter(MARK + word.strip(string.punctuation) for text in texts for word in text.split())
    found = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for stop in range(start + 2, min(len(word), start + LONGEST) + 1):
                found[word[start:stop]] += count
    path.write_text("".join(f"{piece}\t{count}\n" for piece, count in found.most_common(SEEDS)), encoding="utf-8")


def train_pieces(texts: Sequence[str], size: int, seeds: Path) -> bytes:
    """A unigram model in sentencepiece's format; every ASCII character is a piece, so unknown words fall into letters."""
    written = io.BytesIO()
    write_seeds(seeds, texts)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        seed_sentencepieces_file=str(seeds),
        model_writer=written,
        model_type="unigram",
        vocab_size=size,
        character_coverage=1.0,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    model.trainer_spec.ClearField("seed_sentencepieces_file")  # a path of this machine
    return model.SerializeToString()


def t5_tokenizer(model: bytes) -> Tokenizer:
    """The same model for the `tokenizers` library, with the sentinels behind its pieces."""
    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(SENTINELS))]
    pieces = [(piece.piece, piece.score) for piece in content.pieces] + [(token, 0.0) for token in sentinels]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(content.normalizer_spec.precompiled_charsmap)
    marked = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marked])
    tokenizer.decoder = decoders.Metaspace(replacement=MARK, prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", EOS], pair=["$A", EOS, "$B", EOS], special_tokens=[(EOS, 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (PAD, EOS, UNK, *sentinels)])
    return tokenizer


def write_t5(folder: Path, texts: Iterable[str], size: int = T5_SIZE) -> int:
    """Train T5's kind of tokenizer and write its files; returns the size of the vocabulary, sentinels included."""
    with tempfile.TemporaryDirectory() as scratch:
        model = train_pieces(texts, size, Path(scratch) / "seeds.tsv")
    tokenizer = t5_tokenizer(model)
    (folder / "spiece.model").write_bytes(model)
    tokenizer.save(str(folder / "tokenizer.json"))
    sentinels = [f"<extra_id_{index}>" for index in range(SENTINELS)]
    named = {"eos_token": special(EOS), "pad_token": special(PAD), "unk_token": special(UNK)}
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": sentinels} | named)
    tokens = {tokenizer.token_to_id(token): token for token in (PAD, EOS, UNK, *sentinels)}
    added = {str(index): special(token) | {"special": True} for index, token in sorted(tokens.items())}
    settings = {"added_tokens_decoder": added, "additional_special_tokens": sentinels, "clean_up_tokenization_spaces": True}
    settings |= {"eos_token": EOS, "extra_ids": SENTINELS, "legacy": True, "model_max_length": T5_LENGTH}
    write_json(folder / "tokenizer_config.json", settings | {"pad_token": PAD, "tokenizer_class": "T5Tokenizer", "unk_token": UNK})
    return tokenizer.get_vocab_size()


def write_tokenizers(out: Path, texts: Sequence[str], clip_size: int = CLIP_SIZE, t5_size: int = T5_SIZE) -> dict[str, int]:
    """Write `tokenizer/` and `tokenizer_2/` into `out`; returns the sizes of the vocabularies."""
    sizes = {}
    for name, write, size in tqdm((("tokenizer", write_clip, clip_size), ("tokenizer_2", write_t5, t5_size)), unit="vocabulary"):
        with replacing(Path(out) / name) as folder:
            folder.mkdir(parents=True)
            sizes[name] = write(folder, texts, size)
            shutil.rmtree(Path(out) / name, ignore_errors=True)
    return sizes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux_lab.training.tokenizers", description="Train both vocabularies on the captions.")
    parser.add_argument("--scenes", type=Path, default=Path("runs/scenes"), help="folder of scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizers"), help="folder to write")
    parser.add_argument("--texts", type=int, default=60000, help="captions to train on, at most")
    options = parser.parse_args(arguments)
    texts = [caption.text for scene in read_captions(options.scenes) for caption in scene][: options.texts]
    texts += EVERYDAY.split() * EVERYDAY_WEIGHT
    sizes = write_tokenizers(options.out, texts)
    write_json(options.out / "log.json", {"captions": len(texts), "vocabulary": sizes})
    print(f"{len(texts)} captions; CLIP vocabulary {sizes['tokenizer']}, T5 vocabulary {sizes['tokenizer_2']}")


if __name__ == "__main__":
    main()
