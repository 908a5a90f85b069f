"""What every accepted input means, and that everything else is refused by name."""

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pil

from visavis import inputs as prompt_module
from visavis.errors import InputError
from visavis.inputs import Document, Image, Message, Page, Prompt, Text, Video
from visavis.processing.images import content_hash

PIXEL = b"\x89PNG not really, but prompts do not look inside"
URI = "data:image/png;base64," + base64.b64encode(PIXEL).decode()


VIDEO_URI = "data:video/mp4;base64," + base64.b64encode(PIXEL).decode()
PDF_URI = "data:application/pdf;base64," + base64.b64encode(PIXEL).decode()


def parts(item):
    (message,) = Prompt.of(item).messages
    assert message.role == "user"
    return message.parts


def test_str_is_always_text():
    assert parts("cat.jpg") == (Text("cat.jpg"),)
    assert parts(URI) == (Text(URI),)


def test_pictures_on_their_own():
    path, array, picture = Path("cat.jpg"), np.zeros((2, 2), np.uint8), pil.new("RGB", (2, 2))
    assert parts(path) == (Image(path),)
    assert parts(array)[0].source is array
    assert parts(picture)[0].source is picture
    assert parts(Image(PIXEL)) == (Image(PIXEL),)


def test_a_path_is_what_its_suffix_says():
    video, document = Path("a.MP4"), Path("b.pdf")
    assert parts(video) == (Video(video),)
    assert parts(document) == (Document(document),)
    assert parts(Path("c.gif")) == (Image(Path("c.gif")),)
    assert parts(Path("folder.x/frames")) == (Image(Path("folder.x/frames")),)
    asked = Prompt.chat("what?", images=["a.webm", document, "c.png", Image("d.mov")])
    assert asked.messages[0].parts == (
        *(Video("a.webm"), Document(document), Image("c.png"), Image("d.mov"), Text("what?")),
    )
    # where a key says what it is, the suffix does not matter; and a str is still text
    assert parts({"image": video}) == (Image(video),)
    assert parts({"video": "c.gif"}) == (Video("c.gif"),)
    assert parts("a.mp4") == (Text("a.mp4"),)


def test_dict_keeps_the_order_of_its_keys():
    assert parts({"image": "a.jpg", "text": "t"}) == (Image(Path("a.jpg")), Text("t"))
    assert parts({"text": "t", "image": ["a.jpg", Path("b.png")]}) == (
        Text("t"),
        Image(Path("a.jpg")),
        Image(Path("b.png")),
    )
    assert parts({"text": "t", "image": None}) == (Text("t"),)
    assert parts({"image": URI}) == (Image(PIXEL),)


def test_a_str_image_is_a_path_or_data_uri():
    assert Image("a/b.jpg").source == Path("a/b.jpg")
    assert Image("~/b.jpg").source == Path.home() / "b.jpg"
    assert Image("C:/b.jpg").source == Path("C:/b.jpg")
    assert Image(URI).source == PIXEL


def test_openai_content_list():
    content = [
        {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
        {"type": "text", "text": "who?"},
        {"type": "image_url", "image_url": URI},
    ]
    assert parts(content) == (Image(PIXEL), Text("who?"), Image(PIXEL))


def test_videos_and_documents_of_a_dict():
    assert parts({"video": "a.mp4", "text": "t"}) == (Video(Path("a.mp4")), Text("t"))
    frames = Video((Image("1.png"), Image("2.png")))
    assert parts({"video": ["1.png", Path("2.png")]}) == (frames,)
    assert parts({"document": Path("a.pdf")}) == (Document("a.pdf"),)
    asked = Document("a.pdf", pages=[2, 3])
    assert parts({"text": "t", "document": asked, "video": None}) == (Text("t"), asked)
    assert asked.pages == (2, 3)
    assert parts({"document": PDF_URI, "video": VIDEO_URI}) == (Document(PIXEL), Video(PIXEL))


def test_videos_and_documents_on_their_own_and_in_messages():
    video, document = Video("a.mp4", frames=4), Document("a.pdf")
    assert parts(video) == (video,)
    assert parts([document, Text("t")]) == (document, Text("t"))
    assert Message("user", video).parts == (video,)
    prompt = Prompt((Message("user", (Image("b.png"), document, video, "t", Image("c.png"))),))
    assert prompt.visuals == (Image("b.png"), video, Image("c.png"))
    assert prompt.text == "t"


def test_videos_and_documents_of_openai_content():
    content = [
        {"type": "video_url", "video_url": {"url": VIDEO_URI}},
        {"type": "video", "video": VIDEO_URI},
        {"type": "video", "video": [URI, URI]},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF_URI}},
    ]
    frames = Video([PIXEL, PIXEL])
    assert parts(content) == (Video(PIXEL), Video(PIXEL), frames, Document(PIXEL))


def test_chat_takes_videos_and_documents_among_its_images():
    prompt = Prompt.chat("?", images=["a.jpg", Video("b.mp4"), Document("c.pdf")])
    assert prompt.messages[0].parts[:3] == (Image("a.jpg"), Video("b.mp4"), Document("c.pdf"))
    assert Prompt.chat("", images=Video("b.mp4")).visuals == (Video("b.mp4"),)


def test_equal_videos_documents_and_pages():
    assert len({Video("a"), Video(Path("a")), Video("a", frames=2)}) == 2
    assert len({Document("a"), Document(Path("a")), Document("a", pages=(1,))}) == 2
    page = Image(Page(Path("a.pdf"), 1))
    assert page == Image(Page(Path("a.pdf"), 1)) != Image(Page(Path("a.pdf"), 2))
    assert len({page, Image(Page(Path("a.pdf"), 1))}) == 1


def test_openai_messages():
    prompt = Prompt.of(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": ""},
            Message("user", (Text("again"),)),
        ]
    )
    assert [m.role for m in prompt.messages] == ["system", "user", "assistant", "user"]
    assert prompt.text == "be brief\nhi\n\nagain"
    assert prompt.visuals == ()


def test_chat_puts_images_before_text_in_the_last_turn():
    prompt = Prompt.chat(
        "who?",
        images=["a.jpg", PIXEL],
        history=[{"role": "user", "content": "hi"}, Message("assistant", (Text("hello"),))],
    )
    assert [m.role for m in prompt.messages] == ["user", "assistant", "user"]
    assert prompt.messages[-1].parts == (Image("a.jpg"), Image(PIXEL), Text("who?"))


def test_chat_takes_one_image_without_a_list():
    assert Prompt.chat("?", "a.jpg").visuals == (Image("a.jpg"),)
    array = np.zeros((3, 2, 2), np.uint8)
    assert Prompt.chat("?", array).visuals[0].source is array


def test_a_str_as_parts_is_one_text():
    assert Message("user", "hello").parts == (Text("hello"),)


def test_image_equality_is_by_content_named():
    array = np.zeros((2, 2))
    assert Image("a.jpg") == Image(Path("a.jpg")) != Image("b.jpg")
    assert Image(array) == Image(array) != Image(array.copy())
    assert len({Image("a.jpg"), Image("a.jpg"), Image(array), Image(array)}) == 2


@pytest.mark.parametrize(
    ("item", "names"),
    [
        (42, "int"),
        (None, "None"),
        (b"bytes", r"bytes.*visavis\.Image"),
        ([], "empty list"),
        (["a", "b"], "type str"),
        ([{"role": "user", "content": "a"}, "b"], "without|dict with"),
        ({"images": "a.jpg"}, "'images'"),
        ({"text": 3}, "int"),
        ({"image": 3}, "int"),
        ({"image": {"path": "a"}}, "dict"),
        ({"image": ""}, "empty str"),
        ({"role": "tool", "content": "x"}, "'tool'"),
        ({"role": "user", "content": None}, "None"),
        ({"type": "input_audio"}, "'input_audio'"),
        ({"type": "text"}, "None"),
        ({"type": "image_url", "image_url": {}}, "None"),
        ([Message("system", (Text("x"),))], "none from a user"),
        ({"video": 3}, "video is of type int"),
        ({"video": []}, "empty list"),
        ({"video": [3]}, "image is of type int"),
        ({"video": ""}, "video is an empty str"),
        ({"document": ["a.pdf"]}, "document is of type list"),
        ({"image": Video("a.mp4")}, "image is of type visavis.inputs.Video"),
        ({"type": "video"}, "video is None"),
        ({"type": "video", "video": [3]}, "video is of type int"),
        ({"type": "file", "file": {"file_id": "x"}}, "file is None"),
    ],
)
def test_wrong_types_are_named(item, names):
    with pytest.raises(InputError, match=names):
        Prompt.of(item)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Video("a", frames=0), "frames of a video: 0"),
        (lambda: Video("a", frames=True), "True"),
        (lambda: Document("a", pages=()), r"pages are \(\)"),
        (lambda: Document("a", pages=2), "pages are 2"),
        (lambda: Document("a", pages=(1, 0)), "page number: 0"),
        (lambda: Video("data:image/png;base64,AAAA"), "expected video/<kind>"),
        (lambda: Document("data:video/mp4;base64,AAAA"), "expected application/pdf"),
        (lambda: Image(VIDEO_URI), "expected image/<kind>"),
    ],
)
def test_wrong_videos_and_documents(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_a_tensor_is_told_how_to_become_an_array():
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match=r"torch\.Tensor.*permute"):
        Prompt.of(torch.zeros(3, 4, 4))


@pytest.mark.parametrize(
    "item", ["", " \n", {"text": ""}, {}, {"image": [], "text": None}, [Text("")]]
)
def test_empty_is_refused(item):
    with pytest.raises(InputError, match="empty text and no image"):
        Prompt.of(item)


def test_empty_question_is_refused_after_a_history_but_not_beside_an_image():
    with pytest.raises(InputError, match="empty text and no image"):
        Prompt.chat("", history=[Message("user", "hi"), Message("assistant", "hello")])
    assert Prompt.chat("", images=["a.jpg"]).visuals == (Image("a.jpg"),)


@pytest.mark.parametrize("url", ["http://x.org/a.png", "HTTPS://x.org/a.png", "s3://b/a.png"])
def test_remote_urls_are_refused_everywhere(url):
    for make in (
        lambda: Image(url),
        lambda: Prompt.of({"image": url}),
        lambda: Prompt.chat("?", images=[url]),
        lambda: Prompt.of([{"type": "image_url", "image_url": {"url": url}}]),
    ):
        with pytest.raises(InputError, match="download the picture first"):
            make()
    for make in (
        lambda: Video(url),
        lambda: Prompt.of([{"type": "video_url", "video_url": {"url": url}}]),
        lambda: Prompt.of([{"type": "video", "video": [url]}]),
    ):
        with pytest.raises(InputError, match="download the video first"):
            make()
    with pytest.raises(InputError, match="download the document first"):
        Prompt.of({"document": url})


@pytest.mark.parametrize("url", ["/etc/passwd", "file:///etc/passwd", "cat.jpg"])
def test_messages_never_name_local_files(url):
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "video", "video": url},
        {"type": "video", "video": [url]},
        {"type": "file", "file": {"file_data": url}},
    ):
        with pytest.raises(InputError, match="data: URI"):
            Prompt.of([part])


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("data:image/png;base64", "starts"),
        ("data:image/png,abc", "starts"),
        ("data:application/pdf;base64,AAAA", "application/pdf"),
        ("data:image/png;base64,AAA", "not valid base64"),
        ("data:image/png;base64,A*==", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
    ],
)
def test_broken_data_uris(uri, says):
    with pytest.raises(InputError, match=says):
        Image(uri)


def test_data_uri_size_is_bounded(monkeypatch):
    monkeypatch.setattr(prompt_module, "MAX_DATA_URI_BYTES", 3000)
    assert Image("data:image/png;base64," + "AAAA" * 1000).source == bytes(3000)
    with pytest.raises(InputError, match="MiB"):
        Image("data:image/png;base64," + "AAAA" * 1003)


def test_half_characters_are_refused():
    with pytest.raises(InputError, match=r"U\+D800 at 2"):
        Prompt.of("ab\ud800")


def test_bad_history_and_parts():
    with pytest.raises(InputError, match="history is of type str"):
        Prompt.chat("?", history="hello")
    with pytest.raises(InputError, match="message is of type str"):
        Prompt.chat("?", history=["hello"])
    with pytest.raises(InputError, match="part is of type int"):
        Message("user", (3,))
    with pytest.raises(InputError, match="parts are of type int"):
        Message("user", 3)
    with pytest.raises(InputError, match="messages are of type str"):
        Prompt("hello")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
PICTURE = st.binary(max_size=20)


def as_uri(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@given(st.lists(st.one_of(TEXT.map(Text), PICTURE.map(Image)), min_size=1))
def test_openai_content_says_the_same_as_parts(expected):
    content = [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else {"type": "image_url", "image_url": {"url": as_uri(part.source)}}
        for part in expected
    ]
    prompt = Prompt.of(content)
    assert prompt.messages[0].parts == tuple(expected)
    assert prompt == Prompt.of([{"role": "user", "content": content}]) == Prompt.of(prompt)
    assert prompt.visuals == tuple(p for p in expected if isinstance(p, Image))


@given(TEXT, st.lists(PICTURE, max_size=3))
def test_dict_and_chat_agree(text, pictures):
    assert Prompt.of({"image": pictures, "text": text}) == Prompt.chat(text, pictures)
    assert Prompt.of(text) == Prompt.of({"text": text}) == Prompt.chat(text)


KEYS = [
    *("role", "content", "type", "text", "image", "image_url", "url", "video", "video_url"),
    *("document", "file", "file_data"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_a_prompt_or_one_input_error(item):
    try:
        prompt = Prompt.of(item)
    except InputError:
        return
    seen = any(not isinstance(part, Text) for m in prompt.messages for part in m.parts)
    assert seen or prompt.text.strip() or prompt.messages[0].role == "assistant"


def test_importing_prompt_is_light():
    code = "import sys, visavis.inputs; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_content_key_is_equal_exactly_for_equal_content(tmp_path: Path) -> None:
    pil.new("RGB", (5, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())

    def key(item: Any, **fields: str) -> str:
        return Prompt.of(item).content_key(content_hash, **fields)

    a, b = tmp_path / "a.png", tmp_path / "b.png"
    assert key(a) == key(b) == key(Image(a.read_bytes())) == key({"image": str(b)})
    assert key("x") == key({"role": "user", "content": "x"}) == key("x", instruction="")
    different = [
        "x",
        "a\nb",
        {"role": "user", "content": [{"type": "text", "text": one} for one in ("a", "b")]},
        {"role": "assistant", "content": "x"},
        content_hash(a),
        a,
        {"image": a, "text": "x"},
        {"text": "x", "image": a},
        {"image": [a, a]},
    ]
    keys = [key(item) for item in different] + [
        key("x", instruction="y"),
        key("yx"),
        key(a, instruction="y"),
    ]
    assert len(set(keys)) == len(keys)
