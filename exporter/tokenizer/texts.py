"""Short texts that tokenizers are known to disagree on."""

HARD_TEXTS = (
    "",
    " ",
    "     ",
    "Hello world",
    " a space before",
    "spaces after   ",
    "a  b   c    d                 e",
    "1 23 456 7890  3.14  -5e-7  v2  ٣½Ⅷ",
    "it's don't I'LL we've",
    "line\nbreak\n\n\nbreaks\r\n\ttab\n  indented",
    "吾輩は猫である。中文字符的測試。한국어 시험",
    "🎉👩\u200d👩\u200d👧 👍🏽 \u200b\u00a0\u3000ξ ж ش ก ∮",
    "▁ literal ▁▁ <0x41> ĠĊ",
    "<s>begin</s> <unk> [INST] <<SYS>> [/INST]<|im_start|>user<|im_end|>",
    "aaaaaaaaaaaaaaaaaaaa ababababab https://example.org/a_b?c=d&e=%20#f",
)
