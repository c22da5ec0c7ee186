"""The vocabulary (one token per character) and the tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from base_model.layouts import DIRECTED_LABELS, FORMS, PLAIN_LABELS
from base_model.settings import BOS, MAX_POSITIONS, QUOTES, REPOSITORY, SPECIAL_TOKENS, UNK

MIN_COUNT = 15  # a rarer character becomes <unk> unless it is required

# Characters that a prompt of this project may have: the prompts of the study and the course, the templates of the
# homework in both spellings of 下面, and the four few-shot examples.
PROMPT_TEXT = """
你是一位語言轉換助理，能夠根據用戶的輸入，自動判斷句子是白話文還是文言文、並且進行互譯。
無論用戶提供的是白話文還是文言文，你都要進行正確的轉換並給出簡潔的翻譯。
你是人工智慧助理，以下是用戶和人工智能助理之間的對話。你要對用戶的問題提供有用、安全、詳細和禮貌的回答。
翻譯成文言文：幫我把這句話翻譯成文言文 將下麵句子翻譯成文言文：將下面句子翻譯成現代文：答案：
這句話在古代怎麼說：這句話在中國古代怎麼說：翻譯成古文：翻譯成現代文。翻譯成白話文：文言文翻譯：
沒過十天，鮑泉果然被拘捕。後未旬，果見囚執。辛未，命吳堅為左丞相兼樞密使，常楙參知政事。
初五，命令吳堅為左承相兼樞密使，常增為參知政事。明日，趙用賢疏入。第二天，趙用賢的疏奏上。
州民鄭五醜構逆，與叛羌傍乞鐵匆相應，令剛往鎮之。渭州人鄭五醜造反，與叛逆羌傍乞鐵忽互相呼應。下令趟剛前往鎮壓。
""" + "".join(map(chr, range(0x20, 0x7F)))

# Each proper character, followed by the one that the one-to-one map of hanziconv 0.3.2 writes for it.
ONE_TO_ONE = (
    "了瞭出齣鑑鑒家傢回迴千韆向嚮才纔面麵裡裏里裏制製合閤志誌后後御禦只隻別彆表錶秋鞦寧寜臺颱致緻朱硃"
    "胡鬍冬鼕谷榖征徵克剋歷曆舍捨曲麯佔占產産顏顔幹乾于於丑醜採采蒙濛累纍困睏勳勛沈瀋諡謚折摺啟啓佈布"
    "卜蔔卷捲巖岩併並讚贊偽僞松鬆兇凶穀榖託托恆恒獎奬髮發咸鹹借藉閒閑錫锡云雲范範系係干乾鐘鍾洩泄饑飢"
    "游遊斗鬥旋鏇姜薑諮谘幷並慾欲凌淩板闆繫係准準冢塚溼濕鉅巨繡綉複復豎竪臟髒線綫倖幸鉤鈎岳嶽愍湣週周"
    "弔吊籤簽齎賫辟闢弒弑昇升釐厘余餘札劄呵嗬燬毀沖衝儘盡脩修症癥註注譭毀歎嘆癒愈豔艷缽鉢蹟跡灶竈崑昆"
    "党黨台颱稜棱几幾卹恤氾泛盪蕩鬚須矇濛冑胄刮颳釒钅穫獲纖縴珏玨譁嘩崙侖姦奸彙匯蔑衊糹糸餚肴坂阪絃弦"
    "僱雇悽淒蒐搜谿溪瀘濾慄栗唸念嚐嘗譟噪扎紮餵喂沓遝万萬慼戚闇暗剷鏟麴麯逕徑齧嚙朴樸磾䃅痴癡燻熏愨慤"
    "蝨虱蓆席彿佛郁鬱廕蔭吶呐鐫鎸杰傑韁繮扞捍璇璿藁槁孃娘朮術尸屍曏嚮滷鹵郄郤瀰彌捱挨仆僕襁繈鍊煉罈壇"
    "柺拐鹼堿綵彩鋮铖种種剎刹珉瑉鳧鳬伙夥跖蹠霑沾輓挽牴抵鱷鰐檯颱壎塤"
)


def one_to_one_pairs() -> list[tuple[str, str]]:
    """Return (proper character, character of the one-to-one map)."""
    return list(zip(ONE_TO_ONE[::2], ONE_TO_ONE[1::2], strict=True))


def required_characters() -> set[str]:
    """Return every character of the sample data, the prompts and the document layouts."""
    text = PROMPT_TEXT + ONE_TO_ONE
    text += "".join(a + b for a, b in DIRECTED_LABELS + PLAIN_LABELS) + "".join(map("".join, FORMS))
    files = sorted((REPOSITORY / "data/pairs").glob("*.tsv"))
    files += [REPOSITORY / "data/train.json", REPOSITORY / "data/eval.json"]
    for file in files:
        if file.is_file():
            text += file.read_text(encoding="utf-8")
    return set(text) - {"\t", "\r"}


def build_vocabulary(texts: Iterable[str], required: set[str]) -> list[str]:
    """Return special tokens, then characters by descending count, then quotation marks that are not yet included.

    Characters of equal count are ordered by code point. A character that occurs less than `MIN_COUNT` times is left
    out unless it is required.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    chosen = {character for character, count in counts.items() if count >= MIN_COUNT} | required
    marks = [mark for mark in "".join(QUOTES) if mark not in chosen]
    return SPECIAL_TOKENS + sorted(chosen, key=lambda character: (-counts[character], character)) + marks


def encode_characters(text: str, vocabulary: list[str]) -> np.ndarray:
    """Return one id per character, uint16; `<unk>` for a character that the vocabulary does not have."""
    table = np.full(0x110000, UNK, dtype=np.uint16)
    for token_id, token in enumerate(vocabulary[len(SPECIAL_TOKENS) :], len(SPECIAL_TOKENS)):
        table[ord(token)] = token_id
    return table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]


def build_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, newlines included; special tokens add BOS in front."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
