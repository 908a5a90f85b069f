"""MSR-VTT and MSVD by CLIP4Clip's protocol, and the cosines of LLaVE's demo."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.evaluate.official_files import frames, save
from tests.fakes import tiny_model
from visavis.evaluate.check import check_suite
from visavis.evaluate.run import Options, evaluate
from visavis.evaluate.suite import load_suite
from visavis.evaluate.video_retrieval import best_of_sets, official_scores, ranks


def write_msrvtt(root: Path, number: int = 5) -> Path:
    """Write the csv of the 1k-A split; videos are folders of frames but one, which is a film."""
    lines = ["key,vid_key,video_id,sentence"]
    for i in range(number):
        lines.append(f'ret{i},msr{i},video70{i},"a scene, number {i}"')
        if i:
            frames(root / f"videos/video70{i}", i, count=4)
    write_film(root / "videos/video700.mp4")
    (root / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(lines) + "\n")
    return root


def write_film(path: Path) -> None:
    import av

    from tests.evaluate.official_files import photos

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height = 64, 48
        for image in list(photos().values())[:4]:
            container.mux(stream.encode(av.VideoFrame.from_image(image.resize((64, 48)))))
        container.mux(stream.encode())


def write_msvd(root: Path, number: int = 5) -> Path:
    captions = {}
    for i in range(number):
        frames(root / f"YouTubeClips/vid{i}_1_5", i)
        captions[f"vid{i}_1_5"] = [["a", "person", f"does{j}"] for j in range(1 + i % 3)]
    captions["other_0_1"] = [["not", "in", "the", "list"]]
    (root / "test_list.txt").write_text("".join(f"vid{i}_1_5\n" for i in range(number)))
    with (root / "raw-captions.pkl").open("wb") as file:
        pickle.dump(captions, file)
    return root


def test_golden_numbers_of_clip4clip_with_several_captions() -> None:
    """Printed by tensor_text_to_video_metrics and compute_metrics of LLaVE@2c23053."""
    owner = np.repeat(np.arange(12), [3, 1, 2, 4, 1, 2, 3, 1, 1, 2, 5, 2])
    similarity = np.random.default_rng(5).random((len(owner), 12)).astype(np.float32)
    found = official_scores(similarity, owner)
    golden = {
        "t2v R@1": 0.037037036418914795,
        "t2v R@5": 0.4074074172973633,
        "t2v R@10": 0.8518518829345703,
        "t2v MdR": 6.0,
        "t2v MnR": 6.777777777777778,
        "v2t R@1": 0.0,
        "v2t R@5": 0.25,
        "v2t R@10": 0.9166666666666667,
        "v2t MdR": 6.5,
        "v2t MnR": 7.083333333333333,
    }
    assert found == pytest.approx(golden, abs=1e-6)
    by_text, by_video = ranks(similarity, owner)
    assert (by_text <= 5).mean() == pytest.approx(golden["t2v R@5"], abs=1e-6)
    assert (by_video <= 5).mean() == golden["v2t R@5"]


def test_a_videos_captions_count_by_their_best() -> None:
    similarity = np.array([[0.1, 0.2], [0.9, 0.3], [0.5, 0.6]])
    best = best_of_sets(similarity, np.array([0, 0, 1]))
    assert best.tolist() == [[0.9, 0.3], [0.5, 0.6]]


def test_both_sets_run(tmp_path: Path) -> None:
    write_msvd(write_msrvtt(tmp_path))
    assert [one.status for one in check_suite(load_suite("video-retrieval"), tmp_path)] == [
        "ready"
    ] * 2
    output = tmp_path / "run"
    found = evaluate(
        tiny_model(), "video-retrieval", tmp_path, options=Options(output=output, frames=2)
    )
    assert found["incomplete"] == []
    assert found["tasks"]["MSR-VTT"]["n"] == 5 and found["tasks"]["MSVD"]["n"] == 9
    assert set(found["tasks"]["MSVD"]) >= {
        f"{s} {m}" for s in ("t2v", "v2t") for m in ("R@1", "MdR")
    }
    again = evaluate(
        tiny_model(), "video-retrieval", tmp_path, options=Options(output=output, frames=2)
    )
    assert again["tasks"]["MSVD"]["info"]["embedded"] == 0


def test_a_missing_video_is_named(tmp_path: Path) -> None:
    write_msrvtt(tmp_path)
    (tmp_path / "videos/video700.mp4").unlink()
    found = evaluate(tiny_model(), "video-retrieval", tmp_path, tasks=["MSR-VTT"])
    assert "video video700: is missing" in found["incomplete"][0]["reason"]
    assert found["tasks"]["MSR-VTT"]["n"] == 4


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("exit 1",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_msvd(tmp_path)
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"vid0_1_5": Evil()}))
    found = evaluate(tiny_model(), "video-retrieval", tmp_path, tasks=["MSVD"])
    assert "lists of words only" in found["incomplete"][0]["reason"]


def test_the_demo_of_llave_gives_its_cosines(tmp_path: Path) -> None:
    save(tmp_path / "figures/example.jpg", 1)
    found = evaluate(tiny_model(), "llave-demo", tmp_path)
    assert len(found["tasks"]) == 4 and found["incomplete"] == []
    assert all(-1 <= task["cosine"] <= 1 for task in found["tasks"].values())
    assert "published" not in found["tasks"]["caption-cat-and-dog"]  # no model of this width
