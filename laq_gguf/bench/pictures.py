"""Pictures of result files: nothing is measured here, and nothing is read but the JSON.

quality, peers: scores and KL over bytes, and what is found of needles over length and depth;
sweep: speed over context length; memory_curve: memory over it; kept: a page.

Needs the extra `bench` (matplotlib), but for the page.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from laq_gguf.bench.kept_page import kept_page
from laq_gguf.bench.markdown import Document, Row, ordered
from laq_gguf.bench.methods import share_text
from laq_gguf.bench.report import read

WIDTH, HEIGHT, DPI = 6.4, 4.2, 144
MARKERS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench pictures`."""
    parser.add_argument("files", type=Path, nargs="+", help="result files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")


def run(args: argparse.Namespace) -> list[Path]:
    """Draw what each file has, print the paths; return them.

    Raises:
        ValueError: a file is no result, or of a kind that has no picture; no matplotlib.
    """
    documents = [(path.stem, read(path)) for path in args.files]
    for path, (_, document) in zip(args.files, documents, strict=True):
        if document["kind"] not in PICTURES:
            raise ValueError(
                f"{path.name} is of the kind {document['kind']}, which has no picture; "
                f"there are: {', '.join(PICTURES)}"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    made = []
    for stem, document in documents:
        made += PICTURES[document["kind"]](document, args.out / stem)
    compared = [document for _, document in documents if document["kind"] in COMPARED]
    if len(compared) > 1:
        made += _over_bytes_pictures(compared, args.out / "compared")
    if not made:
        raise ValueError("no rows to draw in these files")
    for path in made:
        print(path)
    return made


def pyplot() -> Any:
    """matplotlib, drawing to files.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "pictures need the extra bench, which has matplotlib: pip install 'laq-gguf[bench]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def quality_pictures(document: Document, stem: Path) -> list[Path]:
    """Scores and KL over bytes; a map of needles for each method and size."""
    made = _over_bytes_pictures([document], stem)
    grids = needle_grids(document)
    if grids:
        made.append(_draw_grids(grids, _named(stem, "needles")))
    return made


def _over_bytes_pictures(documents: Sequence[Document], stem: Path) -> list[Path]:
    """Lines of all documents in one picture; each measured with its own prompts."""
    made = []
    for name, label, is_log in (
        ("score", "share of answers found", False),
        ("kl", "KL to the full cache, nats", True),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for document in documents:
            for method, points in over_bytes(document, name).items():
                # in another library than ours, unevicted too
                is_peer = document["kind"] == "peers" and method == "full"
                line = lines.setdefault("full (transformers)" if is_peer else method, [])
                line += [point for point in points if point[1] > 0 or not is_log]
        lines = {method: points for method, points in lines.items() if points}
        if lines:
            what = Labels(f"{label}, by bytes of K and V", "KV cache, share of full f16", label)
            made.append(_draw_lines(lines, what, _named(stem, f"{name}-over-bytes"), log_y=is_log))
    return made


def over_bytes(document: Document, name: str) -> dict[str, list[tuple[float, float]]]:
    """For each method its means of a field over its sizes: (share of the full f16 bytes, mean)."""
    lines: dict[str, list[tuple[float, float]]] = {}
    results = [r for r in document["results"] if r.get(name) is not None]
    for method, size in ordered((r["method"], _size(r)) for r in results):
        group = [r for r in results if (r["method"], _size(r)) == (method, size)]
        shares = [kv_share(r) for r in group]
        if None in shares:
            continue
        point = statistics.fmean(shares), statistics.fmean(r[name] for r in group)
        lines.setdefault(method, []).append(point)
    return {method: sorted(points) for method, points in lines.items()}


def kv_share(row: Row) -> float | None:
    """Bytes of K and V, as a share of the full f16 cache of the prompt; None: not told.

    Rows of methods at equal bytes tell them; of others, the cells that stay of the prompt's.
    """
    if row["method"] == "full":
        return 1.0
    if row.get("share") is not None or "size" in row:
        return row["kv_bytes"] / row["kv_bytes_full"]
    if row.get("budget") and row.get("n_prompt"):
        return min(1.0, row["budget"] / row["n_prompt"])
    return None


def _size(row: Row) -> Any:
    """What was asked for: a share of the bytes, or tokens."""
    share = row.get("share")
    return row.get("size") or (row.get("budget") if share is None else share_text(share))


def needle_grids(document: Document) -> dict[str, dict[tuple[int, float], float]]:
    """By method and size: what is found of needles, by (length of the prompts, depth)."""
    grids: dict[str, dict[tuple[int, float], list[float]]] = {}
    for row in document["results"]:
        if row["task"] != "needles" or row.get("depth") is None:
            continue
        length = row.get("length") or document["settings"].get("length") or row["n_prompt"]
        size = "" if row["method"] == "full" else f" {_size(row)}"
        cell = grids.setdefault(f"{row['method']}{size}", {})
        cell.setdefault((length, row["depth"]), []).append(row["score"])
    return {
        name: {at: statistics.fmean(scores) for at, scores in grid.items()}
        for name, grid in grids.items()
    }


def sweep_pictures(document: Document, stem: Path) -> list[Path]:
    """Decode speed, and time to the first token, over context length."""
    made = []
    for name, label in (
        ("decode_tokens_per_s", "decode, tokens/s"),
        ("first_token_s", "time to the first token, s"),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in document["results"]:
            line = "stock" if row["budget"] is None else f"kv_budget {row['budget']}"
            lines.setdefault(line, []).append((row["context"], statistics.median(row[name])))
        what = Labels(f"{label}, by context", "tokens of the prompt", label)
        short = {"decode_tokens_per_s": "decode", "first_token_s": "first-token"}[name]
        made.append(_draw_lines(lines, what, _named(stem, f"{short}-over-context"), from_zero=True))
    return made


def curve_pictures(document: Document, stem: Path) -> list[Path]:
    """Bytes of K and V, and the peak, over context length."""
    made = []
    for name, label in (("kv_bytes", "K and V, MiB"), ("peak_bytes", "peak memory, MiB")):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in document["results"]:
            side = "stock" if row["library"] == "llama_cpp" else "laq_gguf"
            point = row["context"], row[name] / 2**20
            lines.setdefault(f"{side}, {row['type']}", []).append(point)
        what = Labels(f"{label}, by context", "tokens read", label)
        short = name.removesuffix("_bytes")
        made.append(_draw_lines(lines, what, _named(stem, f"{short}-over-context"), from_zero=True))
    return made


def kept_pictures(document: Document, stem: Path) -> list[Path]:
    """The page of the tokens that stay."""
    path = stem.with_name(f"{stem.name}.html")
    path.write_text(kept_page(document), encoding="utf-8")
    return [path]


class Labels(NamedTuple):
    """Title of a picture, and what its axes show."""

    title: str
    x: str
    y: str


def _named(stem: Path, what: str) -> Path:
    return stem.with_name(f"{stem.name}-{what}.png")


def _draw_lines(
    lines: dict[str, list[tuple[float, float]]],
    labels: Labels,
    path: Path,
    *,
    log_y: bool = False,
    from_zero: bool = False,
) -> Path:
    """A line for each name; x is a power of two."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    for i, (name, points) in enumerate(lines.items()):
        # matplotlib has ten colours
        marker, style = MARKERS[i // 10 % len(MARKERS)]
        axes.plot(*zip(*sorted(points), strict=True), marker + style, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: share_text(x) if x < 1 else f"{x:,.0f}")
    if log_y:
        axes.set_yscale("log")
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set(title=labels.title, xlabel=labels.x, ylabel=labels.y)
    axes.grid(alpha=0.3)
    if len(lines) > 8:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.set_figwidth(WIDTH + 2)
    else:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def _draw_grids(grids: dict[str, dict[tuple[int, float], float]], path: Path) -> Path:
    """A map for each name: length across, depth down, green found, red lost."""
    plt = pyplot()
    columns = min(6, math.ceil(len(grids) ** 0.5))
    n_rows = -(-len(grids) // columns)
    figure, axes = plt.subplots(
        n_rows, columns, figsize=(3.2 * columns, 2.8 * n_rows), layout="constrained", squeeze=False
    )
    image = None
    for axis, (name, grid) in zip(axes.flat, grids.items(), strict=False):
        lengths, depths = (sorted({at[i] for at in grid}) for i in (0, 1))
        cells = [[grid.get((n, d), float("nan")) for n in lengths] for d in depths]
        image = axis.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        shown = _some(len(depths), 6)
        axis.set_yticks(shown, [f"{depths[i]:.0%}" for i in shown])
        axis.set_title(name, fontsize="medium")
        axis.set(xlabel="tokens", ylabel="depth")
    for axis in list(axes.flat)[len(grids) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label="found")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def _some(n: int, most: int) -> Sequence[int]:
    return range(0, n, max(1, -(-n // most)))


COMPARED = ("quality", "peers")
PICTURES: dict[str, Callable[[Document, Path], list[Path]]] = {
    "quality": quality_pictures,
    "peers": quality_pictures,
    "sweep": sweep_pictures,
    "memory_curve": curve_pictures,
    "kept": kept_pictures,
}
