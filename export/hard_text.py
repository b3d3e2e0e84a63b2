"""Text on which tokenizers go wrong: the corpus over which an exported tokenizer is proved (`export.tokenizer`).

Generated from the compact tables below, always the same. Every string is valid Unicode (no lone surrogates).
U+0000 is in it, although a string tensor of ONNX Runtime ends there: whoever proves a tokenizer must deal with it.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence

SENTENCES = """
The quick-witted fox couldn't (or wouldn't) jump; it said: “No!”
Où êtes-vous, garçon ? L’œuvre naïve coûte 12,50 €… déjà
Übergrößenträger äßen süße Öle, ẞ und ß
El pingüino Ñandú preguntó: ¿cuándo?, ¡mañana!
İstanbul'da ılık ığdır çayı içtiğimizde şöyle dedi
Zażółć gęślą jaźń; příliš žluťoučký kůň; ő ű đ ħ ŋ
Tiếng Việt có nhiều dấu thanh: ổ, ệ, ữ, ẵ
ʻŌlelo Hawaiʻi, ǃXóõ, Ɛʋɛgbe, ǅ ǆ ﬁ ﬂ ſ
Съешь ещё этих мягких булок; ї є ґ ў ѣ Ѳ ӏ
Ὁ ἄνθρωπος φησίν· τί ἐστιν; ΑΒΓ ς σ
مرحبًا بالعالم، كيف حالُكَ؟ ١٢٣ لا ﷺ
یہ اردو ہے، گچپژ ۴۵۶ می‌خواهم
שָׁלוֹם עוֹלָם! מה נשמע? ״ציטוט״ ק״מ
ܫܠܡܐ ܥܠܡܐ ޝުކުރިއްޔާ ߒߞߏ
नमस्ते दुनिया! क्षत्रिय, हिन्दी में ज़रूर १२३।
বাংলা ভাষায় স্বাগতম, কৃষ্ণচূড়া ৪৫৬
ਪੰਜਾਬੀ ਵਿੱਚ ਸੁਆਗਤ ગુજરાતી ક્ષમા
வணக்கம் உலகம், ஸ்ரீ க்ஷ ௧௨௩
తెలుగు స్వాగతం ಕನ್ನಡ ಸ್ವಾಗತ മലയാളം സ്വാഗതം ൻ ൽ
සිංහල ආයුබෝවන් ක්‍රියාව ශ්‍රී
สวัสดีชาวโลก น้ำกำลังไหล ๑๒๓ ฯลฯ
ສະບາຍດີ ຊາວໂລກ ໐໑໒ བཀྲ་ཤིས་བདེ་ལེགས།
សួស្តីពិភពលោក ភាសាខ្មែរ ១២៣។
မင်္ဂလာပါ ကမ္ဘာလောက ၁၂၃။
你好，世界！我在2024年3月买了“书”。
繁體中文、廣東話嘅冇佢，龍龜鬱
𠮷野家で𩸽を食べる 𪚥 㐀 豈
こんにちは、世界！カタカナｶﾅ、ヴァイオリン々ゝ
안녕하세요 세계! 한국어ㅋㅋㅋ 뷁 쀍
ᄒᆞᆫ글 옛한글 ᄀᆞᆷ ㅏㅑ ﾡﾢ
ሰላም ዓለም፣ እንዴት ነህ? ፩፪፫።
გამარჯობა მსოფლიო, ᲛᲗᲐᲕᲠᲣᲚᲘ ႠႡႢ ⴀⴁ
Բարեւ աշխարհ։ Ողջու՛յն և օ ﬓ
ᐃᓄᒃᑎᑐᑦ ᏣᎳᎩ ꮳꮃꭹ ᚠᚢᚦᚨᚱᚲ ᚁᚂᚃ
ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ᠌ ᠎ꡏꡡꡃ
𐌰𐌱𐌲 𐎀𐎁 𒀀𒀁 𓀀𓁐 𐤀𐤁 𑀓𑀔 𝒜𝓑𝔠 𞤀𞤣 𛀀
ꦗꦮ ᬩᬮᬶ ᮞᮥᮔ᮪ᮓ ᨅᨔ ᜊᜌ᜔ ꧑꧒ Ⲁⲃ ⰀⰁ ꙮ
∀x∈ℝ ∃ε>0: |f(x)−L| ≤ ε ⇒ ∑∫∂∇√∞ ≠ ½⅓ x²y₃ ℵ₀ ⟨ψ|φ⟩ 𝔸𝟙𝟚
π≈3.14159 ±5% ‰ ° ′ ″ × ÷ ¬ ∧ ∨ ⊕ ⊗ ← → ↔ ⌈x⌉ ⟦y⟧
£5 ¥6 ₹7 ₿8 ¢9 ¤ © ® ™ § ¶ † ‡ • ‣ № ℃ Ⅷ ⅳ ① ⑳ ㊀ ㍿ Ａｂｃ１２３
─│┌┐╔═╗█▓▒░■□▲△●○★☆♠♥♪ ⠓⠑⠇⠇⠕ ☰☷ 🀄🂡
""".strip().split("\n")

EMOJI = """
😀 😂🤣 👍🏽 👩🏿‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🏴‍☠️ 🇫🇷🇩🇪 🇺🇳 1️⃣ #️⃣ *️⃣ ❤️ ❤ ❤️‍🔥 ☎︎ 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🧑🏻‍🤝‍🧑🏿 🤷🏾‍♀️ 👁️‍🗨️ 🫠 🫨 🪿 🐦‍⬛ 🆗 ㊙️ ‼️ ©️ 🧿 🕴🏼
"""

NUMBERS = """
0 7 42 007 1234567890 3.14159 -1 +2 1e-9 6.022E+23 0xDEADbeef 0b1010 0o755 1_000_000 1,234,567.89 1.234.567,89
12:34:56 2024-02-29T23:59:60Z 29/02/24 192.168.0.1 ::1 fe80::1%eth0 +49(0)30/1234-56 50% $9.99 1st 2nd 3rd 4th
1/2 ½ 10^100 x² 3×4 №5 IV ⅩⅡ ١٢٣ १२३ 一二三 １２３ 𝟘𝟙𝟚 1️⃣2️⃣ 555-0199 v1.2.3-rc.4+b5 1..2 1...2 .5 5. --5 1e 0x
99999999999999999999
"""

CODE = [
    'def f(x: int = 3, *args, **kw) -> "str":\n    """Doc."""\n    return f"{x!r:>{10}}"  # it\'s\n\n\n',
    "for i in range(10):\n\tif i % 2 == 0:\n\t\tprint(i, end='')\n\telse:\n\t\tpass\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", a->b[3] << 2); return 0; }\r\n',
    "fn main() -> Result<(), Box<dyn Error>> { let v: Vec<&'static str> = vec![\"a\"]; Ok(()) }",
    "const f = async (x) => { await g`t${x}`; return x?.y ?? z !== null && !a || b; };",
    'SELECT "a".*, COUNT(*) FROM t AS a WHERE x <> \'it\'\'s\' AND y IS NOT NULL; -- end',
    "<!DOCTYPE html>\n<div class='a b' id=\"c\">&lt;b&gt; &amp;&nbsp;<br/></div><!-- x -->",
    'public static <T extends List<T>> void f(T... xs) throws Exception { @Override int i = xs[0]++; }',
    "#!/bin/sh\nset -euo pipefail; cat <<EOF | grep -v '^#' > \"$HOME/${x:-y}\" 2>&1 &\nEOF\n",
    "\\documentclass{article}\\begin{equation}\\frac{1}{2}\\sum_{i=0}^{n} x_i^2\\end{equation}% \\\\",
    "\tMOVQ AX, (SP)\n.LC0:\n\t.string \"hi\"\n\tjmp\t.L2\n",
    "(define (f x) (let* ((y '(1 . 2))) `(,x ,@y)))",
    "main = do { xs <- getLine; print $ (\\x -> x >>= id) <$> [xs] }  {- c -}",
    "a:=b;c!=d;e===f;g<=>h;i<<=3;j>>>=4;k**=2;l//=2;m|=n;o&&p;q??=r;s::t;u..=v;w@x;~y;^z",
    "key: &a [1, 2]\nother: *a\n- >-\n  folded\n  text\n---\n...\n",
    "@@ -1,3 +1,4 @@\n-old\n+new\n \n\\ No newline at end of file",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE __dunder__ $var @attr %s {{x}} <T> [[y]] ((z))",
    '{"a": [1, 2.5e3, -0, null, true], "b\\u00e9": {"": "\\n\\"q\\""}, "c": []}',
    '{"messages":[{"role":"user","content":"hi <b"}],"n":1}\n{"x":"\\ud83d\\ude00"}\n',
    "[\n    {\n        \"k\": \"v\"\n    }\n]\n",
    "https://user:pw@example.org:8080/a/b%20c/?q=1&r=%C3%A9#frag?x",
    "mailto:a.b+c@ex-ample.co.uk www.例え.jp //cdn.x/y.js file:///C:/Program%20Files/ data:text/plain;base64,SGk=",
    "C:\\Users\\x\\new folder\\t.txt \\\\host\\share ~/.config/../x ./a.b/*.c",
    "# Title\n\n* item\n  1. sub\n\n| a | b |\n|---|:-:|\n\n```py\nx\n```\n> q **b** _i_ [l](u)  \n",
    "if a<b", "a < b", "x<y>z", "List<T", "!<!", "<", "<<", "</", "<|", "|>", "<|x", "a<|im", "</s", "[INS", "x <=",
]  # fmt: skip

# Everything that some engine calls white space, and what looks like none.
BLANKS = (
    "\t\n\v\f\r \x1c\x1f\x85\xa0\u1680\u180e\u2000\u2003\u2009\u200a\u200b\u200c\u200d\u200e"
    "\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
BLANK_FRAMES = ("a{0}b", "a {0}b", "a{0} b", "{0}{0}x", "x{0}", "  {0}!", "a\n{0}\n {0}1")

COMBINING = "\u0301\u0327\u0489\u05b8\u064b\u093f\u094d\u0e31\u1160\u20e3\u3099\ufe0f\U000e0100\U0001f3fd"
LONE_FRAMES = ("{0}", "a{0}", " {0}", "1{0}{0}b", "!{0} ")

# Controls, non-characters, private use, tags, unassigned and last code points, letters of Unicode 14 to 16.
ODD = (
    [chr(code) for code in (*range(0, 32), *range(127, 160))]
    + list("\xad\u061c\u202e\u2066\ufffc\ufffd\ufffe\uffff\ufdd0\ue000\uf8ff\U000e0001\U000e0067\U000e007f")
    + [chr(code) for code in (0x378, 0x2FE0, 0x1FFFE, 0x30000, 0x3FFFD, 0x40000, 0x5A5A5, 0x8E001, 0xBFFFF, 0xC0000)]
    + [chr(code) for code in (0xF0000, 0xF8FFF, 0x100000, 0x10FFFD, 0x10FFFF, 0x1E900, 0x1FBF0, 0x2A6DF, 0x323AF)]
    + [chr(code) for code in (0x870, 0x1C89, 0x9FFD, 0xA7D0, 0x10570, 0x10D40, 0x16AC0, 0x1DF00, 0x1E4F0, 0x2EBF0)]
)
ODD_FRAMES = ("a{0}b", " {0}", "!{0}!", "  {0}1", "{0}'ve")

WORDS = "it we they I you Who O 日本 é 5 _ )"
CONTRACTIONS = "'s 't 're 've 'm 'll 'd 'S 'LL 'Re 'vE 'M 'D 'T ’s ’ll 'sx 'l 'r 'll's ''s 'ſ"

# Written in the chat formats of many models. Where a tokenizer does not know one, it is plain text.
FOREIGN_SPECIAL = """
<|endoftext|> <|im_start|> <|im_end|> <s> </s> <unk> <pad> <bos> <eos> [CLS] [SEP] [MASK] [INST] [/INST] <<SYS>>
<|begin_of_text|> <|eot_id|> <|user|> <think> </think> <0x0A> <start_of_turn> <|fim_prefix|> ▁ ▁the Ġ Ġthe Ċ </w> ##ing
"""


def _scripts() -> Iterator[str]:
    for sentence in SENTENCES:
        yield sentence
        yield unicodedata.normalize("NFD", sentence)
        yield sentence[::-1]  # marks before their letters, surrogate-free all the same
        yield sentence.upper().replace(" ", "")
        yield f" {sentence.lower()} \n\n{sentence}\t"
    yield " ".join(SENTENCES)
    yield "".join(word for sentence in SENTENCES for word in sentence.split()[:2])


def _symbols() -> Iterator[str]:
    for emoji in EMOJI.split():
        yield emoji
        yield f"ok{emoji}{emoji}!"
        yield f"so {emoji} 1{emoji[:-1]} {emoji[1:]}"
    yield "".join(EMOJI.split())
    for number in NUMBERS.split():
        yield number
        yield f"x={number}, ({number})\n{number}"
        yield f"  {number}a {number}"
    yield " ".join(NUMBERS.split())


def _code() -> Iterator[str]:
    for code in CODE:
        yield code
        yield code.replace("    ", "\t").replace("\n", "\r\n") + "  "
    yield "\n\n".join(CODE)


def _contractions() -> Iterator[str]:
    for number, (word, tail) in enumerate(itertools.product(WORDS.split(), CONTRACTIONS.split())):
        yield word + tail + ("", " go", "x", "1", "  ")[number % 5]


def _blanks() -> Iterator[str]:
    for frame, blank in itertools.product(BLANK_FRAMES, BLANKS):
        yield frame.format(blank)
    for one, other in itertools.pairwise(BLANKS + BLANKS[::-2]):
        yield f"x {one}{other} y{other}{one}{one}"
    for size in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 200):
        for blank in (" ", "\n", "\t", "\r\n", " \n", "\x85", "\xa0", "\u3000"):
            yield blank * size
            yield f"a{blank * size}b"
        yield f"a{' ' * size}\x85b{' ' * size}\x85\n{' ' * size}\0!{' ' * size}\n"


def _odd() -> Iterator[str]:
    for frame, odd in itertools.product(ODD_FRAMES, ODD):
        yield frame.format(odd)
    for frame, mark in itertools.product(LONE_FRAMES, COMBINING):
        yield frame.format(mark)
    yield "".join(ODD)
    yield "e" + COMBINING * 40
    yield "!".join(ODD)


def _long() -> Iterator[str]:
    for piece in ("a", "ab", "Donaudampfschiff", "的", "क्ष", "😀", "=", "-_", "9", "ACGT", "ᄀ", "\u0301", "<", "<|"):
        yield piece * (4096 // len(piece))
    yield "".join(chr(0x4E00 + step * 37 % 20000) for step in range(3000))
    yield "".join("etaoin shrdlu"[step * step % 13] for step in range(5000))
    yield "".join(chr(33 + step * 7919 % 94) for step in range(3000))


def _special(tokens: Sequence[str]) -> Iterator[str]:
    known = list(dict.fromkeys(tokens))
    every = [*known, *FOREIGN_SPECIAL.split()]
    for token in every:
        yield token
        yield f"a{token}b"
        yield f"see  {token} \n{token}{token}'s\n"
        yield f"x{token[:-1]}"
        yield f"{token[:1]}{token}{token[1:]} {token[:-1]}{token}y"
        yield f"{token[: len(token) // 2]}z"  # a beginning of a special token, then one character, then the end
        yield token.upper() + token.lower()
    for one, other in itertools.pairwise(every):
        yield one + other
        yield f"{one}user\nhi 's{other}\n {one[:-1]}{other[1:]}"
    yield "".join(known)
    yield " ".join(known)


def hard_text(special_tokens: Sequence[str]) -> list[str]:
    """Distinct hard strings, always the same for the same `special_tokens` (the added tokens' texts): well over 600."""
    parts = (_scripts(), _symbols(), _code(), _contractions(), _blanks(), _odd(), _long(), _special(special_tokens))
    return list(dict.fromkeys(itertools.chain([""], *parts)))
