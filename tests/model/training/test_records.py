import io
import json
import random
import re
import tarfile
import tracemalloc

import pytest
from formats import drawing, png, shard, understanding

from omnimamba_model.training import json_list
from omnimamba_model.training.records import PICTURE, BadRecord, open_records, spelled_out


def test_every_format_gives_the_same_records(data):
    for names, expected in [
        (["t2i.jsonl"], [drawing(i) for i in range(11)]),
        (["t2i.tar"], [drawing(i) for i in range(11)]),
        (["mmu.json"], [understanding(i, 2 + 2 * (i % 2)) for i in range(7)]),
        (["mmu.tar"], [understanding(i, 2 + 2 * (i % 2)) | {PICTURE: png(i)} for i in range(7)]),
    ]:
        records, bad = open_records([data / name for name in names])
        assert not bad and [records[i] for i in range(len(records))] == expected


def test_files_follow_one_another(data):
    records, _ = open_records([data / "t2i.jsonl", data / "t2i.*"])
    assert len(records) == 33
    assert [records[i] for i in (0, 10, 11, 21, 22, 32)] == [drawing(i % 11) for i in (0, 10, 11, 21, 22, 32)]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{00..1}x", ["00x", "01x"]),
        ("{0..11}", [str(i) for i in range(12)]),
        ("{10..0}", [str(i) for i in range(10, -1, -1)]),
        ("{a,b}/{0..1}.tar::c.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar", "c.tar"]),
        ("x{a,b{1..2},}", ["xa", "xb1", "x", "xb2"]),
        ("{a}/{..}*.tar", ["{a}/{..}*.tar"]),
    ],
)
def test_names_with_braces_are_spelled_out(name, expected):
    assert spelled_out(name) == expected


def test_braces_that_stand_for_no_end_of_names_are_told():
    for name in ("{0..999999999999}", "{0..999}{0..999}", "{1..60000}::{1..60000}"):
        with pytest.raises(ValueError, match="more than 100,000 files"):
            spelled_out(name)


def test_shards_are_named_as_webdataset_names_them(data):
    for i in range(9, 12):
        shard(data / f"s-{i:03}.tar", {f"{j}.json": json.dumps({"i": i, "j": j}).encode() for j in range(2)})
    (data / "s-{1..2}.tar").write_bytes((data / "s-011.tar").read_bytes())  # a file of that very name
    for name in (f"{data}/s-{{009..011}}.tar", f"{data}/s-0{{09,1?}}.tar", f"{data}/s-009.tar::{data}/s-01*.tar"):
        records, bad = open_records([name])
        assert not bad and [(r["i"], r["j"]) for r in records] == [(i, j) for i in range(9, 12) for j in range(2)]
    records, _ = open_records([data / "s-{1..2}.tar"])
    assert [r["i"] for r in records] == [11, 11]
    with pytest.raises(ValueError, match=r"s-012.tar names no file"):
        open_records([f"{data}/s-{{009..012}}.tar"])


def test_text_outside_ascii_keeps_its_places(tmp_path):
    said = [{"value": "Größe 画 \u2028"}, {"value": "}],["}, {"a": [1, {"b": 2}]}]
    (tmp_path / "a.json").write_text(" [ " + " ,\n".join(json.dumps(v, ensure_ascii=False) for v in said) + " ]\n")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(json.dumps(v, ensure_ascii=False).encode() for v in said) + b"\n\n")
    for name in ("a.json", "a.jsonl"):
        records, _ = open_records([tmp_path / name])
        assert [records[i] for i in range(3)] == said


def test_samples_of_a_shard_are_told_apart_by_their_folders(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [("x/0.json", b'{"a": 1}'), ("y/0.json", b'{"a": 2}'), ("y/0.JPG", png(0))]:
            folder = tarfile.TarInfo(name.partition("/")[0])
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    records, _ = open_records([tmp_path / "a.tar"])
    assert [records[i] for i in range(len(records))] == [{"a": 1}, {"a": 2, PICTURE: png(0)}]


def test_damage_is_found_where_it_is(data):
    (data / "bad.jsonl").write_text('{"a": 1}\n{"a": \n[1]\n{"a": 4}\n')
    records, _ = open_records([data / "bad.jsonl"])
    assert records[0] == {"a": 1} and records[3] == {"a": 4}
    for i in (1, 2):
        with pytest.raises(BadRecord, match="is not JSON|must be an object, got list"):
            records[i]
    shard(data / "bad.tar", {"a.png": png(0), "b.json": b"{}"})
    records, _ = open_records([data / "bad.tar"])
    with pytest.raises(BadRecord, match="has no .json"):
        records[0]
    whole = (data / "t2i.jsonl").read_bytes()
    records, _ = open_records([data / "t2i.jsonl"])
    (data / "t2i.jsonl").write_bytes(whole[:-30])
    with pytest.raises(BadRecord, match="ends within"):
        records[10]


def test_unreadable_files_are_reported(data):
    (data / "a.tar").write_bytes(b"no tar at all" * 100)
    (data / "b.json").write_text('{"not": "a list"}')
    (data / "c.json").write_text('[{"a": 1}, nonsense]')
    (data / "d.json").write_text('[{"a": 1}, {"a": 2},\n')  # cut off where a record ends
    shards = (data / "t2i.tar").read_bytes()
    (data / "e.tar").write_bytes(shards[:5120])  # cut off where a sample ends
    (data / "f.tar").write_bytes(shards[:5120] + b"x" * 512 + shards[5632:])  # a header in its middle is damaged
    names = ["a.tar", "b.json", "c.json", "d.json", "e.tar", "f.tar"]
    records, bad = open_records([data / "t2i.jsonl", *(data / name for name in names)])
    assert len(records) == 11 and sorted(path.rsplit("/")[-1] for path in bad) == names
    for files, message in [
        ([data / "a.tar"], "no record in .*unreadable"),
        ([data / "nothing*"], "names no file"),
        ([data / "0.png"], "must end in one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_records(files)


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"a": 1}] {"a": 2}', "is left over"),
        ('[{"a": 1}]]', "is not JSON after 1 records"),
        ('[{"a": 1} {"a": 2}]', "is left over"),
        ('[{"a": 1}}', "is left over"),
        ('[{"a": 1},]', "after 1 records"),
        ('[,{"a": 1}]', "after 0 records"),
        ('[{"a": 1}', "cut off after 1 records"),
        ("[", "cut off after 0 records"),
        ("", "must be a JSON list"),
    ],
)
def test_a_list_is_read_whole_or_not_at_all(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_records([tmp_path / "a.json"])


def test_empty_lists_and_shards_have_no_records(data):
    (data / "a.json").write_text(" [ ]\n")
    shard(data / "a.tar", {})
    records, bad = open_records([data / "a.json", data / "a.tar", data / "t2i.jsonl"])
    assert len(records) == 11 and not bad


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_a_list_is_found_in_pieces_of_any_size(tmp_path, monkeypatch, piece):
    """Strings with brackets, quotes and backslashes; numbers, nothing and lists where objects should be."""
    monkeypatch.setattr(json_list, "PIECE", piece)
    draw = random.Random(piece)

    def value(depth):
        kind = draw.randrange(6 if depth else 4)
        if kind < 2:
            return "".join(draw.choices('ab"\\\\{}[],: \n画\u2028', k=draw.randrange(9)))
        if kind < 4:
            return draw.choice([True, None, -1.5e-30, 12345678901234567, 1.2345678901234567e-10, 0])
        inner = [value(depth - 1) for _ in range(draw.randrange(4))]
        return inner if kind == 4 else {str(value(0)): part for part in inner}

    path = tmp_path / "a.json"
    for count in (0, 1, 2, 40):
        items = [value(3) for _ in range(count)]
        for options in ({}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (",", ":")}):
            path.write_text(json.dumps(items, **options))
            whole = path.read_bytes()
            found = [whole[at : at + size] for at, size in json_list.list_items(path)]
            assert [json.loads(part) for part in found] == items
        path.write_bytes(whole[: draw.randrange(1, len(whole))])
        with pytest.raises(ValueError, match="cut off after|is not JSON after"):
            list(json_list.list_items(path))


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_a_number_may_have_any_length(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(json_list, "PIECE", piece)
    numbers = ["1.2345678901234567e-10", "-" + "7" * 5000, "0." + "1" * 99 + "e-12"]
    path = tmp_path / "a.json"
    path.write_text(f"[{', '.join(numbers)}]")
    whole = path.read_text()
    assert [whole[at : at + size] for at, size in json_list.list_items(path)] == numbers
    for wrong in ("1" * 30 + "x", "1." + "0" * 30 + "e", "true" * 9):
        path.write_text(f"[3, {wrong}, 4]")
        with pytest.raises(ValueError, match="is not JSON after 1 records: '"):
            list(json_list.list_items(path))


def test_a_bad_record_of_a_list_is_bad_alone(tmp_path):
    (tmp_path / "a.json").write_text(
        '[{"a": 1}, {"a": nonsense}, {"a": 3,}, 5, "x", {"a": "\x01"}, {"a": "\\q"}, {"a": 8}, [1}, {"a": 9}]'
    )
    (tmp_path / "b.json").write_bytes(b'[{"a": "\xff"}, {"a": 1}]')
    records, bad = open_records([tmp_path / "a.json", tmp_path / "b.json"])
    assert len(records) == 12 and not bad
    assert [records[i] for i in (0, 7, 9, 11)] == [{"a": 1}, {"a": 8}, {"a": 9}, {"a": 1}]
    for i in (1, 2, 3, 4, 5, 6, 8, 10):
        with pytest.raises(BadRecord, match=rf"[ab].json, record {i % 10}: (is not JSON|must be an object)"):
            records[i]


def test_a_long_list_is_never_held(tmp_path, monkeypatch):
    """Ten times as many records cost their places alone, 16 bytes each; so does a record longer than a piece."""
    monkeypatch.setattr(json_list, "PIECE", 1 << 16)
    peaks = []
    for count in (1_000, 10_000):
        path = tmp_path / f"{count}.json"
        record = json.dumps(understanding(1) | {"id": "x" * 600})
        path.write_text("[" + ", ".join([record] * count) + "]")
        tracemalloc.start()
        records, _ = open_records([path])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(records) == count and records[count - 1] == json.loads(record)
    assert path.stat().st_size > 7e6
    assert peaks[0] < 4 * json_list.PIECE and peaks[1] - peaks[0] < 40 * 9_000
    path.write_text('[{"a": "' + "x" * (5 * json_list.PIECE) + '"}, {"a": 2}]')
    assert open_records([path])[0][1] == {"a": 2}


def test_a_long_shard_keeps_places_alone(tmp_path):
    """A directory for each sample between, pictures of several kinds: 32 bytes a sample are left."""
    path, count = tmp_path / "a.tar", 3000
    pairs = {f"{i}/x.json": json.dumps({"i": i}).encode() for i in range(count)}
    shard(path, pairs | {f"{i}/x.{('bmp', 'PNG')[i % 2]}": bytes([i % 256]) for i in range(count)} | {"0/x.jpg": b"j"})
    tracemalloc.start()
    records, bad = open_records([path])
    left = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert not bad and [records[i]["i"] for i in range(count)] == list(range(count))
    assert [records[i][PICTURE] for i in (0, 1, 2, 2999)] == [b"j", b"\x01", b"\x02", bytes([2999 % 256])]
    assert left < 80 * count
