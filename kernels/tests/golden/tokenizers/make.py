"""Makes the files beside this one: two small SentencePiece models, and ids that the reference programs give.

    python3 -m venv venv && venv/bin/pip install sentencepiece==0.2.1 mistral-common
    venv/bin/python kernels/tests/golden/tokenizers/make.py
"""
import glob
import io
import json
import os

import mistral_common
import sentencepiece
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

HERE = os.path.dirname(os.path.abspath(__file__))
TEXTS = [
    "All human beings are born free and equal in dignity and rights.",
    "The polder's dry; it'll stay so, they've said.",
    "In 1953, 12345678 m³ — 3.14159 and 1,000,000",
    "Ångström, žluťoučký kůň, ελληνικά, Українська, 語, العربية, हिन्दी",
    "two  spaces,   three\n\n\nlines\r\n\ttabs",
    " a space before",
    "e\u0301t\u00e9 and 🙂🙃👩‍👩‍👧 ﬁne ½",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment",
    "CamelCaseWords ALLCAPS DON'T won't I'M",
    "Menschenwürde Gleichberechtigung onafhankelijkheidsverklaring",
    "",
]
out = {"texts": TEXTS, "small": {}, "published": {}}

lines = []
for path in sorted(glob.glob(os.path.join(HERE, "../../../../cli/data/udhr/*.train.txt"))):
    if os.path.basename(path)[:2] in ("en", "de", "nl", "fr"):
        lines += [line.strip() for line in open(path, encoding="utf-8") if line.strip()]
for kind, size, extra in [
    ("bpe", 700, dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True)),
    ("unigram", 500, dict(normalization_rule_name="nmt_nfkc", byte_fallback=False)),
]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=size, model_type=kind, num_threads=1,
        character_coverage=0.999, minloglevel=2, **extra)
    open(os.path.join(HERE, f"{kind}.model"), "wb").write(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = [processor.encode(text) for text in TEXTS]
    out["small"][f"{kind}.model"] = {"ids": ids, "texts": [processor.decode(one) for one in ids]}

data = os.path.join(os.path.dirname(mistral_common.__file__), "data")
for name in ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]:
    processor = sentencepiece.SentencePieceProcessor(model_file=os.path.join(data, name))
    out["published"][name] = {"ids": [processor.encode(text) for text in TEXTS]}
for name in ["tekken_240911.json"]:
    tekken = Tekkenizer.from_file(os.path.join(data, name))
    out["published"][name] = {"ids": [tekken.encode(text, bos=False, eos=False) for text in TEXTS]}
json.dump(out, open(os.path.join(HERE, "expected.json"), "w", encoding="utf-8"), ensure_ascii=False, separators=(",", ":"))
