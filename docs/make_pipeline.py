"""Draws the pipeline in both languages: python docs/make_pipeline.py writes docs/pipeline.svg and docs/zh/pipeline.svg

Boxes bring their own background, and lines and words outside of them have a grey that is read on white and on black:
one picture for light and dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT = 980, 534
INK, LINE = "#1f2933", "#76828f"
FILLS = {"data": "#fdf1d3", "model": "#dcecfb", "stage": "#d9f0e1", "step": "#f3f9f5", "tool": "#ece9f6"}
EDGES = {"data": "#c9982f", "model": "#4a87c0", "stage": "#3f9a64", "step": "#3f9a64", "tool": "#8073b5"}

Words = dict[str, str]
ENGLISH: Words = {
    "title": "rlhfkit: SFT, reward model and PPO, and what passes between them",
    "base": "a model", "base2": "base or chat: Qwen,", "base3": "LLaMA, Baichuan",
    "rows_sft": "prompts with answers", "rows_sft2": "alpaca, ShareGPT, messages",
    "rows_rm": "ranked answers", "rows_rm2": "pairs, or more",
    "rows_ppo": "prompts",
    "sft": "1 · rlhfkit sft", "sft2": "learns what an answer is", "sft3": "and where it ends",
    "rm": "2 · rlhfkit rm", "rm2": "learns which answer", "rm3": "is the better one",
    "ppo": "3 · rlhfkit ppo",
    "sample": "sample answers", "score": "score them", "score2": "+ rules, servers", "advantage": "advantages",
    "advantage2": "score − β·KL, less V", "update": "clipped update", "again": "again, until the prompts are done",
    "policy": "policy", "final": "final/ → transformers, peft",
    "reference": "policy and reference", "judge": "judge",
    "look": "inspect · --plan", "mend": "doctor · convert · fix-checkpoint", "use": "generate · score · merge · report",
}  # fmt: skip
CHINESE: Words = {
    "title": "rlhfkit：SFT、奖励模型、PPO，以及三者之间传递什么",
    "base": "模型", "base2": "基座或对话：Qwen、", "base3": "LLaMA、Baichuan",
    "rows_sft": "提示 + 回答", "rows_sft2": "alpaca、ShareGPT、messages",
    "rows_rm": "排序的回答", "rows_rm2": "一对或更多",
    "rows_ppo": "提示",
    "sft": "1 · rlhfkit sft", "sft2": "学会回答长什么样、", "sft3": "在哪里结束",
    "rm": "2 · rlhfkit rm", "rm2": "学会判断", "rm3": "哪个回答更好",
    "ppo": "3 · rlhfkit ppo",
    "sample": "采样回答", "score": "打分", "score2": "也可用规则、服务", "advantage": "优势",
    "advantage2": "得分 − β·KL，减去 V", "update": "裁剪更新", "again": "循环，直到提示用完",
    "policy": "策略", "final": "final/ → transformers、peft",
    "reference": "策略与参考模型", "judge": "打分者",
    "look": "inspect · --plan", "mend": "doctor · convert · fix-checkpoint", "use": "generate · score · merge · report",
}  # fmt: skip


def box(kind: str, x: int, y: int, width: int, height: int, *lines: str, bold: bool = True) -> str:
    """A rounded box with centred lines, the first of them bold."""
    top, middle = y + height / 2 - 9.5 * (len(lines) - 1) + 5, x + width / 2
    kinds = ["b" if bold else "t"] + ["t"] * len(lines)
    words = "".join(
        f'<text x="{middle:g}" y="{top + 19 * i:g}" class="{style}">{escape(line)}</text>'
        for i, (line, style) in enumerate(zip(lines, kinds, strict=False))
    )
    return frame(kind, x, y, width, height) + words


def frame(kind: str, x: int, y: int, width: int, height: int) -> str:
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="8"'
    return f'<rect {place} fill="{FILLS[kind]}" stroke="{EDGES[kind]}"/>'


def arrow(path: str, word: str = "", x: float = 0, y: float = 0) -> str:
    """A line with a head at its end, and a word beside it."""
    return f'<path d="{path}" class="l"/>' + (note(word, x, y) if word else "")


def note(word: str, x: float, y: float) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="n">{escape(word)}</text>'


def pipeline(w: Words) -> str:
    """The picture with these words."""
    parts = [
        # What comes in, and what looks at it.
        box("data", 200, 16, 190, 56, w["rows_sft"], w["rows_sft2"]),
        box("data", 430, 16, 150, 56, w["rows_rm"], w["rows_rm2"]),
        box("data", 700, 16, 160, 56, w["rows_ppo"]),
        box("tool", 16, 20, 140, 48, w["look"], bold=False),
        arrow("M156 44 H194"),
        box("model", 16, 186, 140, 84, w["base"], w["base2"], w["base3"]),
        # The stages.
        box("stage", 200, 186, 190, 84, w["sft"], w["sft2"], w["sft3"]),
        box("stage", 430, 186, 150, 84, w["rm"], w["rm2"], w["rm3"]),
        frame("stage", 640, 130, 324, 270),
        f'<text x="802" y="158" class="b">{escape(w["ppo"])}</text>',
        box("step", 660, 176, 130, 56, w["sample"]),
        box("step", 814, 176, 134, 56, w["score"], w["score2"]),
        box("step", 814, 280, 134, 56, w["advantage"], w["advantage2"]),
        box("step", 660, 280, 130, 56, w["update"]),
        f'<text x="802" y="380" class="t">{escape(w["again"])}</text>',
        arrow("M790 204 H808"),
        arrow("M881 232 V274"),
        arrow("M814 308 H796"),
        arrow("M725 280 V238"),
        # From one to the next.
        arrow("M156 228 H194"),
        arrow("M295 72 V180"),
        arrow("M505 72 V180"),
        arrow("M780 72 V124"),
        arrow("M390 228 H424"),
        arrow("M580 228 H634", w["judge"], 607, 218),
        arrow("M295 270 V360 H634", w["reference"], 464, 352),
        # What comes out.
        arrow("M802 400 V448"),
        box("model", 702, 454, 200, 64, w["policy"], w["final"]),
        box("tool", 360, 462, 290, 48, w["use"], bold=False),
        arrow("M702 486 H656"),
        box("tool", 16, 392, 250, 48, w["mend"], bold=False),
        arrow("M86 392 V276"),
    ]
    style = (
        "text{font-family:-apple-system,'Segoe UI',Roboto,'Noto Sans','PingFang SC','Microsoft YaHei',"
        "'Noto Sans CJK SC','WenQuanYi Micro Hei',sans-serif;text-anchor:middle}"
        f".b{{font-size:16px;font-weight:600;fill:{INK}}}.t{{font-size:13px;fill:{INK}}}"
        f".n{{font-size:13px;fill:{LINE}}}.l{{fill:none;stroke:{LINE};stroke-width:1.6;marker-end:url(#head)}}"
    )
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        f"<title>{escape(w['title'])}</title>\n<style>{style}</style>\n<defs>{head}</defs>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


PICTURES = {HERE / "pipeline.svg": ENGLISH, HERE / "zh" / "pipeline.svg": CHINESE}

if __name__ == "__main__":
    for path, words in PICTURES.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(pipeline(words), encoding="utf-8")
