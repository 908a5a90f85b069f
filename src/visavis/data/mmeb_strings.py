"""What MMEB asks of a model, task by task: instructions verbatim, mistakes included.

    TASKS["OK-VQA"].query    "Represent the given image with the following question:"
    TASKS["CIRR"].target     "Represent the given image."

Strings only. A task's own text follows its instruction after a space (`embed(…, instruction=…)` of
the profiles vlm2vec-v1 and -v2); a target without a string is plain text. MMEB's rows bring their
instructions along: where a row differs, the row is right. Knows no data and no scores.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strings:
    """Instructions of one task.

    Args:
        query: before the text of a query.
        target: before the text of a candidate, if any; empty: candidates are text alone.
    """

    query: str
    target: str = ""


_IMAGE = "Represent the given image."
_CROP = "Represent the given cropped image of the object"
_WIKIPEDIA = "Represent the given Wikipedia image with related text information:"
_VIDEO = "Understand the content of the provided video."
_CLIP = "Understand the content of the provided video clip."
_CLASSIFY = Strings("Represent the given image for classification")
_SCENE = Strings("Identify the scene shown in the image")
_OBJECT = Strings("Identify the object shown in the image")
_QUESTION = Strings("Represent the given image with the following question:")
_MOMENT = Strings(
    "Find the clip that corresponds to the described scene in the given video:", _VIDEO
)
_VIDEO_QUESTION = Strings(
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question:"
)
PAGES = Strings(  # every visual-document task
    "Find a document image that matches the given query:",
    "Understand the content of the provided document image.",
)

IMAGE_TASKS = {  # MMEB-V1
    # classification
    "ImageNet-1K": _CLASSIFY,
    "N24News": Strings(
        "Represent the given news image with the following caption for domain classification:"
    ),
    "HatefulMemes": Strings(
        "Represent the given image for binary classification to determine whether it constitutes "
        "hateful speech or not"
    ),
    "VOC2007": _OBJECT,
    "SUN397": _SCENE,
    "Place365": _SCENE,
    "ImageNet-A": _CLASSIFY,
    "ImageNet-R": _CLASSIFY,
    "ObjectNet": _OBJECT,
    "Country211": Strings("Identify the country depicted in the image"),
    # questions
    **dict.fromkeys(
        ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"), _QUESTION
    ),
    **dict.fromkeys(("ScienceQA", "VizWiz", "GQA", "TextVQA"), _QUESTION),
    # retrieval
    "VisDial": Strings(
        "Represent the given dialogue about an image, which is used for image retrieval:",
        "Represent the given image",
    ),
    "CIRR": Strings(
        "Given an image, find a similar everyday image with the described changes:", _IMAGE
    ),
    "VisualNews_t2i": Strings("Retrieve an image of this news caption.", _IMAGE),
    "VisualNews_i2t": Strings("Find a caption for the news in the given photo."),
    "MSCOCO_t2i": Strings("Find me an everyday image that matches the given caption:", _IMAGE),
    "MSCOCO_i2t": Strings("Find an image caption describing the given everyday image."),
    "NIGHTS": Strings("Find a day-to-day image that looks similar to the provided image.", _IMAGE),
    "WebQA": Strings("Find a Wikipedia image that answers this question:", _WIKIPEDIA),
    "FashionIQ": Strings("Find an image to match the fashion image and style note:", _IMAGE),
    "Wiki-SS-NQ": Strings(
        "Find the document image that can answer the given query:", "Represent the given image"
    ),
    "OVEN": Strings(
        "Retrieve a Wikipedia image-description pair that provides evidence for the question of "
        "this image:",
        _WIKIPEDIA,
    ),
    "EDIS": Strings(
        "Find a news image that matches the provided caption:",
        "Represent the given image with related text information:",
    ),
    # grounding; the texts stand in quotation marks
    "MSCOCO": Strings("Crop the image to to isolate the object labeled as", _CROP),  # sic
    "RefCOCO": Strings(
        "Select the portion of the image that follows the language expressions.", _CROP
    ),
    "RefCOCO-Matching": Strings(
        "Select the portion of the image that follows the language expressions:",
        "Select the portion of the image that follows the language expressions:",
    ),
    "Visual7W-Pointing": Strings(
        "Select the portion of the image that answers the question", _CROP
    ),
}
MSCOCO_TRAINING = Strings(
    "Select the portion of the image that isolates the object labeled as", _CROP
)

VIDEO_TASKS = {  # MMEB-V2
    # classification
    "K700": Strings("Recognize the category of the video content."),
    "SmthSmthV2": Strings(
        "What actions or object interactions are being performed by the person in the video?"
    ),
    "HMDB51": Strings("What actions or objects interactions are the person in the video doing?"),
    "UCF101": Strings("What activities or sports are being performed by the person in the video?"),
    "Breakfast": Strings("Recognize the breakfast type that the person is cooking in the video."),
    # questions
    **dict.fromkeys(
        ("MVBench", "Video-MME", "NExTQA", "EgoSchema", "ActivityNetQA"), _VIDEO_QUESTION
    ),
    # retrieval
    "DiDeMo": Strings("Find a video that includes the following described scenes:", _VIDEO),
    "MSR-VTT": Strings("Find a video that contains the following visual content:", _VIDEO),
    "MSVD": Strings("Find the video snippet that corresponds to the given summary:", _VIDEO),
    "VATEX": Strings("Select a video that fits the description provided:", _VIDEO),
    "YouCook2": Strings(
        "Find a video that demonstrates the following action while making a recipe:", _VIDEO
    ),
    # moments
    "QVHighlight": _MOMENT,
    "Charades-STA": _MOMENT,
    "MomentSeeker": Strings("Find the clip that corresponds to the given text:", _CLIP),
}
MOMENT_SEEKER = {  # by what a query shows beside its text
    "": VIDEO_TASKS["MomentSeeker"],
    "image": Strings("Select the video clip that aligns with the given text and image:", _CLIP),
    "video": Strings(
        "Find the clip that corresponds to the given sentence and video segment:", _CLIP
    ),
}

TASKS = IMAGE_TASKS | VIDEO_TASKS

VISRAG_TRAINING = {  # openbmb/VisRAG-Ret-Train-In-domain-data, by `source`
    "NeurIPS Papers": Strings(
        "This query is about a research paper from NeurIPS, a leading AI/ML conference. The "
        "document contains technical discussions, methodologies, and findings. Identify relevant "
        "papers and sections that address the query: ",
        "A research paper from NeurIPS on AI and ML topics.",
    ),
    "Textbooks": Strings(
        "This query is related to a college-level textbook, which provides structured "
        "explanations, definitions, and examples. Find the most relevant concepts or explanations "
        "that address the query: ",
        "A textbook page with structured educational content and explanations.",
    ),
    "ICML Papers": Strings(
        "This query is about a research paper from ICML, a leading AI/ML conference. The document "
        "contains theoretical insights, experiments, and applications. Identify relevant papers "
        "and sections that best answer the query: ",
        "A research paper from ICML, covering machine learning topics.",
    ),
    "Manuallib": Strings(
        "This query pertains to a product manual, which contains detailed technical "
        "specifications, usage instructions, and troubleshooting steps. Find the most relevant "
        "section that answers the query: ",
        "A product manual page with technical specifications and instructions.",
    ),
    "ArxivQA": Strings(
        "This query is related to retrieving a relevant figure from an ArXiv research paper. The "
        "retrieved figure should contain scientific plots, mathematical visualizations, or "
        "experimental results that best address the query: ",
        "A figure from a research paper, including plots or experimental results.",
    ),
    "ChartQA": Strings(
        "This query is related to retrieving a relevant chart that visually represents numerical "
        "or categorical data. The retrieved chart should contain bar graphs, line charts, or other "
        "visual elements necessary to analyze trends, compare values, or extract insights related "
        "to the query: ",
        "A statistical chart comparing values or analyzing trends.",
    ),
    "MP-DocVQA": Strings(
        "This query is related to retrieving a relevant page from a multi-page document, such as "
        "reports, invoices, or research papers. The retrieved document should contain text, "
        "tables, or structured information necessary to answer the query: ",
        "A page from a multi-page document with text or tables.",
    ),
    "InfoVQA": Strings(
        "This query is related to retrieving an infographic that visually presents statistical or "
        "factual information using charts, icons, and structured layouts. The retrieved image "
        "should contain the necessary visual elements to provide the best context for answering "
        "the query: ",
        "An infographic with structured data, charts, and annotations.",
    ),
    "PlotQA": Strings(
        "This query relates to retrieving a relevant plot or chart that visually represents "
        "numerical data. The retrieved figure should contain the necessary information to analyze "
        "trends, compare values, or extract key insights related to the query: ",
        "A numerical data visualization, such as bar charts or line graphs.",
    ),
    "SlideVQA": Strings(
        "This query is related to retrieving a relevant presentation slide that visually presents "
        "structured information. The retrieved slide should contain the necessary text, charts, or "
        "graphics to provide the best answer to the query: ",
        "A presentation slide with text, bullet points, and diagrams.",
    ),
}
HOUND_QUESTION = "Answer a question based on the content of a video. "  # LLaVA-Hound, training
HOUND_RETRIEVAL = Strings(
    "Find a video that contains the following visual content: ",
    "Understand the content of the provided video: ",
)
