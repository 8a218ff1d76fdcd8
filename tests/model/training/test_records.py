import io
import json
import re
import tarfile

import pytest
from formats import drawing, png, shard, understanding

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
