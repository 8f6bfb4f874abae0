"""A checkpoint against its record: hashes of all files, the job's fingerprint, and bits counted from stored bytes.

The three countings of bits are taken from the tensors' sizes and the headers of the packed parts alone:

    stored  8 × all bytes of packed tensors / weights
    codes   8 × bytes of tensors that hold quantized values / weights
    paper   by the method's formula, weighted by the weights that a token uses (eq. 44)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from mobie.check.files import Damaged, Hashes, TensorFile, digest, parse_json, read_json, read_tensor_file
from mobie.check.findings import Report
from mobie.check.records import Stored, same

MANIFEST, KEPT = "manifest.json", "kept.safetensors"
CODE_TENSORS = ("codes", "signs", "weight")  # last part of the names of tensors that hold quantized values
AGAIN = "delete the checkpoint and its record, and run the quantize job again"
TOP_K = ("num_experts_per_tok",)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass
class Count:
    """Bytes of packed weights by item, and what bits are counted from."""

    bytes_by_item: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    active: float = 0.0
    paper: float = 0.0  # bits by the paper's formula × active weights

    def bits(self) -> dict[str, float]:
        """The measurements of a quantize record."""
        codes = sum(size for name, size in self.bytes_by_item.items() if name.rpartition(".")[2] in CODE_TENSORS)
        return {
            "bits_paper": self.paper / self.active,
            "bits_codes": 8 * codes / self.weights,
            "bits_stored": 8 * sum(self.bytes_by_item.values()) / self.weights,
        }


def check_checkpoint(record: Stored, hashes: Hashes, report: Report) -> None:
    """Compare the folder beside a quantize record that is ok with the record."""
    folder = record.path.parent / "checkpoint"
    path = folder / MANIFEST
    try:
        manifest_hash = hashes.sha256(path)
        manifest = read_json(path)
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        blocks, fingerprint = int(manifest["blocks"]), manifest["fingerprint"]
    except (Damaged, KeyError, TypeError, ValueError, AttributeError) as error:
        report.error(path, f"not a manifest ({error})", "the list of a finished checkpoint's files", AGAIN)
        return
    if manifest_hash is not None and manifest_hash != record.details.get("manifest"):
        report.error(
            path, f"sha256 {manifest_hash}", f"{record.details.get('manifest')} as in {record.path.name}", AGAIN
        )
    _check_files(folder, listed, hashes, report)
    wanted = [f"block-{index:03d}.safetensors" for index in range(blocks)] + [KEPT]
    for name in wanted:
        if name not in listed:
            report.error(path, f"{name} is not in the list", f"a shard for each of {blocks} blocks", AGAIN)
    _check_fingerprint(record, folder, fingerprint, report)
    _check_bits(record, folder, wanted, fingerprint, report)
    report.seen["checkpoints"] += 1


def _check_files(folder: Path, listed: Mapping[str, tuple[int, str]], hashes: Hashes, report: Report) -> None:
    """Every listed file is there, has the listed size and hash, and lies in the folder."""
    for name, (size, expected) in listed.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            report.error(folder / MANIFEST, f"lists {name!r}", "plain names of files in the folder", AGAIN)
        elif not path.is_file():
            report.error(path, "no such file", f"{size} bytes as in {MANIFEST}", AGAIN)
        elif path.stat().st_size != size:
            report.error(path, f"{path.stat().st_size} bytes", f"{size} as in {MANIFEST}", AGAIN)
        else:
            try:
                got = hashes.sha256(path)
            except Damaged as damage:
                report.error(path, str(damage), "a file that can be read", AGAIN)
                continue
            if got not in (None, expected):
                report.error(path, f"sha256 {got}", f"{expected} as in {MANIFEST}", AGAIN)


def _check_fingerprint(record: Stored, folder: Path, fingerprint: Any, report: Report) -> None:
    """The fingerprint is made of the code, inputs, method and options that the record names."""
    try:
        made_by = read_json(folder / "config.json")["quantization_config"]["method"]
        provenance = record.raw["provenance"]
        job = {
            "code": provenance["code"],
            "inputs": provenance["inputs"],
            "method": made_by,
            "options": record.details["options"],
        }
    except (Damaged, KeyError, TypeError) as error:
        report.error(folder / "config.json", f"no quantization_config ({error})", "the method's name", AGAIN)
        return
    if digest(job) != fingerprint:
        report.error(
            record.path,
            f"code, inputs, method and options have the fingerprint {digest(job)}",
            f"{fingerprint} as in {MANIFEST}: record and checkpoint are of different jobs",
            AGAIN,
        )


def _check_bits(record: Stored, folder: Path, files: list[str], fingerprint: Any, report: Report) -> None:
    """Bytes and bits of the record against the tensors that are stored."""
    count, total = Count(), 0
    try:
        share = active_share(read_json(folder / "config.json"))
        for index, name in enumerate(files):
            path = folder / name
            stored = read_tensor_file(path)
            total += path.stat().st_size
            metadata = parse_json(stored.metadata["mobie"].encode())
            own = fingerprint if name == KEPT else sha256(f"{fingerprint}/{index}".encode()).hexdigest()
            if metadata["fingerprint"] != own:
                what = f"fingerprint {metadata['fingerprint']}: a shard of another job or block"
                report.error(path, what, f"{own}, which follows from {MANIFEST}", AGAIN)
            if name != KEPT:
                count_block(f"block{index}", stored, metadata, share, count)
            elif sum(stored.sizes.values()) != record.details["kept_bytes"]:
                kept = sum(stored.sizes.values())
                report.error(record.path, f"kept_bytes {record.details['kept_bytes']}", f"{kept} as stored", AGAIN)
    except Damaged as damage:
        report.error(path, str(damage), "a shard as it was written", AGAIN)
        return
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        report.error(folder, f"a shard's header cannot be read ({error!r})", "the packed parts of a block", AGAIN)
        return
    _compare(record, count, total, report)


def _compare(record: Stored, count: Count, file_bytes: int, report: Report) -> None:
    recorded = record.details.get("bytes_by_item", {})
    for name in sorted(set(recorded) | set(count.bytes_by_item)):
        if recorded.get(name) != count.bytes_by_item.get(name):
            report.error(
                record.path,
                f"bytes_by_item: {name} {recorded.get(name)}",
                f"{count.bytes_by_item.get(name)} bytes as stored",
                AGAIN,
            )
    if record.details.get("file_bytes") != file_bytes:
        report.error(record.path, f"file_bytes {record.details.get('file_bytes')}", f"{file_bytes} on disk", AGAIN)
    if not count.weights:
        report.error(record.path, "no packed weight in its checkpoint", "weights that bits are counted for", AGAIN)
        return
    for name, bits in count.bits().items():
        measured = record.values.get(name, {"value": None, "n": None})
        if not same(measured["value"], bits) or measured["n"] != count.weights:
            report.error(
                record.path,
                f"{name} {measured['value']} over {measured['n']} weights",
                f"{bits:.10g} over {count.weights} weights, from the stored bytes",
                AGAIN,
            )


def active_share(config: Mapping[str, Any]) -> float:
    """Share of a layer's experts that a token uses. Raises `KeyError` for a configuration without experts."""
    top_k = next(config[key] for key in TOP_K if key in config)
    return top_k / next(config[key] for key in EXPERTS if key in config)


def count_block(block: str, stored: TensorFile, metadata: Mapping[str, Any], share: float, count: Count) -> None:
    """Add the packed parts of a block's shard. Raises `KeyError` and the like for a header of another form."""
    names = metadata["names"]
    for part, entry in metadata["headers"].items():
        kind, _, rest = part.partition(".")
        prefix = f"{names['block']}{rest}." if kind == "linears" else f"{names['block']}{names['experts']}.{rest}__"
        own = {n.removeprefix(prefix).replace("__", "."): n for n in stored.sizes if n.startswith(prefix)}
        if entry["format"] != "dense16":
            own.pop("weight", None)  # stands for the parameter that the part replaces, without elements
        count.bytes_by_item |= {f"{block}.{part}.{name}": stored.sizes[full] for name, full in own.items()}
        shapes = {name: stored.shapes[full] for name, full in own.items()}
        if entry["format"] == "bank":
            weights, paper = _bank(entry["header"], shapes, share)
            active = weights * share
        else:
            size, paper = _matrix(entry["format"], entry["header"], shapes, share)
            weights = math.prod(size)
            active = weights * (share if len(size) == 3 else 1.0)  # the experts of a layer, or a Linear
        count.weights += weights
        count.active += active
        count.paper += paper * active


def _matrix(
    form: str, header: Mapping[str, Any], shapes: Mapping[str, Any], share: float
) -> tuple[tuple[int, ...], float]:
    """(out, in) of a packed matrix, (experts, out, in) where experts share a codebook; bits by the paper's formula."""
    if form == "dense16":
        return tuple(shapes["weight"]), 16.0
    if form == "vector":
        return _vectors(shapes, share)
    if form == "partial-binary":
        salient = header["salient"] / math.prod(header["size"])
        return tuple(header["size"]), (1 - salient) + header["bits"] * salient + 1
    if form == "planes":
        return tuple(header["size"]), sum(header["plane_columns"]) / header["size"][1]
    if form == "binary":
        out, columns = header["size"]
        return (out, columns), 1 + shapes["salient"][0] / columns
    size = (shapes["scale"][0], header["columns"])
    return size, float(header["paper"] if form == "grid" else header["bits"])


def _vectors(shapes: Mapping[str, Any], share: float) -> tuple[tuple[int, ...], float]:
    """Codes, norms and the codebook of vectors; experts that share one read it whole, however few a token uses."""
    *experts, rows = shapes["row_norm"]
    columns, (centroids, dimension) = shapes["column_norm"][-1], shapes["codebook"]
    size = (*experts, rows, columns)
    codes = math.prod(size[:-1]) * math.ceil(columns / dimension) * math.log2(centroids)
    norms = 16 * (math.prod(shapes["row_norm"]) + math.prod(shapes["column_norm"]))
    codebook = 16 * centroids * dimension / (share if experts else 1.0)
    return size, (codes + norms + codebook) / math.prod(size)


def _bank(header: Mapping[str, Any], shapes: Mapping[str, Any], share: float) -> tuple[int, float]:
    """Weights of a bank of experts, and their bits by the paper's formula (eqs. 43, 44)."""
    experts = header["count"]
    matrices = [
        _matrix(header["expert_format"], own, own_shapes, share)
        for own, own_shapes in zip(_each(header["headers"], experts), _expert_shapes(header, experts), strict=True)
    ]
    rows, columns = stored_size = matrices[0][0]
    basis_weights = basis_bits = 0.0
    if header["basis"] is not None:
        own = {n.removeprefix("basis."): shape for n, shape in shapes.items() if n.startswith("basis.")}
        size, basis_bits = _matrix(header["basis"]["format"], header["basis"]["header"], own, share)
        basis_weights = math.prod(size)
        rows, columns = (size[0], columns) if header["side"] == "left" else (rows, size[1])
    each = math.fsum(paper for _, paper in matrices) / experts
    paper = each * math.prod(stored_size) / (rows * columns)
    return experts * rows * columns, paper + basis_bits * basis_weights / (share * experts * rows * columns)


def _expert_shapes(header: Mapping[str, Any], experts: int) -> Iterator[dict[str, Any]]:
    folded = {name: _each(shapes, experts) for name, shapes in header["shapes"].items()}
    for expert in range(experts):
        yield {name: shapes[expert] for name, shapes in folded.items()}


def _each(folded: Mapping[str, Any], count: int) -> list[Any]:
    return [folded["all"]] * count if "all" in folded else list(folded["each"])
