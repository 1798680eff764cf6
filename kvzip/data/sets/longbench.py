"""LongBench (https://arxiv.org/abs/2308.14508), its 21 tasks with their prompts split into context and question.

The prompts put instructions behind the context too. These are asked with the question, so that a context is compressed
without them, and rows with the same context are one record. All tasks are asked in the chat template, also those that
the benchmark asks without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from kvzip.data.files import Row, Source, group_by_context
from kvzip.data.metrics import (
    classification,
    code_similarity,
    first_line,
    number_share,
    rouge_l,
    rouge_l_zh,
    token_f1,
    token_f1_zh,
)
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Metric, Options, register

TREC_CLASSES = (
    "Abbreviation", "Expression abbreviated", "Animal", "Organ of body", "Color",
    "Invention, book and other creative piece", "Currency name", "Disease and medicine", "Event", "Food",
    "Musical instrument", "Language", "Letter like a-z", "Other entity", "Plant", "Product", "Religion", "Sport",
    "Element and substance", "Symbols and sign", "Techniques and method", "Equivalent term", "Vehicle",
    "Word with a special property", "Definition of something", "Description of something", "Manner of an action",
    "Reason", "Group or organization of person", "Individual", "Title of a person", "Description of a person", "City",
    "Country", "Mountain", "Other location", "State", "Postcode or other code", "Number of something", "Date",
    "Distance, linear measure", "Price", "Order, rank", "Other number", "Lasting time of somethin",
    "Percent, fraction", "Speed", "Temperature", "Size, area and volume", "Weight",
)  # fmt: skip
LSHT_CLASSES = (
    "农业、农村", "军事", "文学、艺术", "体育", "传媒业", "电子信息产业", "文化、休闲娱乐", "社会、劳动", "经济",
    "服务业、旅游业", "环境、气象", "能源、水务、水利", "财政、金融", "教育", "科学技术", "对外关系、国际关系",
    "矿业、工业", "政治", "交通运输、邮政、物流", "灾难、事故", "基本建设、建筑业、房地产", "医药、卫生",
    "法律、司法", "商业、外贸、海关",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        context, question: templates with `{context}` and `{input}`.
        prefix: beginning of the answer; None = the last line of the question, where that is a label such as "Type:".
        classes: all class names, of a task that asks for one.
    """

    summary: str
    context: str
    question: str
    prefix: str | None
    max_new_tokens: int
    score: Metric
    classes: tuple[str, ...] = ()


_CONCISE = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
_QASPER = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.'
)
_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)


def _passages(summary: str) -> Task:
    context = f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}"
    return Task(summary, context, f"{_PASSAGES}\n\nQuestion: {{input}}", "Answer:", 32, token_f1)


TASKS = {
    "narrativeqa": Task(
        "questions about a story; F1 of words",
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_CONCISE}\n\nStory: {{context}}",
        f"Now, answer the question based on the story {_CONCISE}\n\nQuestion: {{input}}",
        "Answer:", 128, token_f1,
    ),
    "qasper": Task(
        "questions about a scientific article; F1 of words",
        f"You are given a scientific article and a question. Answer the question {_QASPER}\n\nArticle: {{context}}",
        f"Answer the question based on the above article {_QASPER}\n\nQuestion: {{input}}",
        "Answer:", 128, token_f1,
    ),
    "multifieldqa_en": Task(
        "questions about texts of many fields; F1 of words",
        "Read the following text and answer briefly.\n\n{context}",
        "Now, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}",
        "Answer:", 64, token_f1,
    ),
    "multifieldqa_zh": Task(
        "questions about Chinese texts of many fields; F1 of words",
        "阅读以下文字并用中文简短回答：\n\n{context}",
        "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}",
        "回答：", 64, token_f1_zh,
    ),
    "hotpotqa": _passages("HotpotQA, questions about several passages; F1 of words"),
    "2wikimqa": _passages("2WikiMultihopQA, questions about several passages; F1 of words"),
    "musique": _passages("MuSiQue, questions about several passages; F1 of words"),
    "dureader": Task(
        "questions about Chinese documents; ROUGE-L",
        "请基于给定的文章回答下述问题。\n\n文章：{context}",
        "请基于上述文章回答下面的问题。\n\n问题：{input}",
        "回答：", 128, rouge_l_zh,
    ),
    "gov_report": Task(
        "summaries of government reports; ROUGE-L",
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}",
        "Now, write a one-page summary of the report.",
        "Summary:", 512, rouge_l,
    ),
    "qmsum": Task(
        "summaries of meetings by query; ROUGE-L",
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}",
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}",
        "Answer:", 512, rouge_l,
    ),
    "multi_news": Task(
        "summaries of several news; ROUGE-L",
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}",
        "Now, write a one-page summary of all the news.",
        "Summary:", 512, rouge_l,
    ),
    "vcsum": Task(
        "summaries of Chinese meetings; ROUGE-L",
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}",
        "会议总结：", "", 512, rouge_l_zh,
    ),
    "trec": Task(
        "types of questions after examples; right class",
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}",
        "{input}", None, 64, first_line(classification(TREC_CLASSES)), TREC_CLASSES,
    ),
    "triviaqa": Task(
        "trivia about a passage after examples; F1 of words",
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}",
        "{input}", None, 32, first_line(token_f1),
    ),
    "samsum": Task(
        "summaries of dialogues after examples; ROUGE-L",
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}",
        "{input}", None, 128, first_line(rouge_l),
    ),
    "lsht": Task(
        "classes of Chinese news after examples; right class",
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}",
        "{input}", None, 64, first_line(classification(LSHT_CLASSES)), LSHT_CLASSES,
    ),
    "passage_count": Task(
        "number of different paragraphs; share of the numbers given",
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}",
        "Please enter the final count of unique paragraphs after removing duplicates. The output format should only "
        "contain the number, such as 1, 2, 3, and so on.",
        "The final answer is: ", 32, number_share,
    ),
    "passage_retrieval_en": Task(
        "the paragraph of an abstract; share of the numbers given",
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}",
        "The following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is "
        'from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.',
        "The answer is: ", 32, number_share,
    ),
    "passage_retrieval_zh": Task(
        "the paragraph of a Chinese abstract; share of the numbers given",
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}",
        "下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是\"段落1\"，\"段落2\"等格式",
        "答案是：", 32, number_share,
    ),
    "lcc": Task(
        "the next line of code; edit similarity",
        "Please complete the code given below. \n{context}", "Next line of code:", "", 64, code_similarity,
    ),
    "repobench-p": Task(
        "the next line of code in a repository; edit similarity",
        "Please complete the code given below. \n{context}", "{input}Next line of code:", "", 64, code_similarity,
    ),
}  # fmt: skip


def ask(task: Task, row: Row) -> tuple[str, str, list[str]]:
    """Return question, answer prefix and references of a row.

    Raises:
        ValueError: a reference that is none of the task's classes.
    """
    question, prefix = task.question.replace("{input}", row.text("input")), task.prefix
    if prefix is None:
        head, _, last = question.rstrip().rpartition("\n")
        labelled = bool(head) and last.endswith((":", "："))
        question, prefix = (head, last) if labelled else (question, "")
    references = row.references("answers")
    for reference in references:
        if task.classes and reference not in task.classes:
            raise ValueError(f"{row.where}: answer {reference!r} is none of the classes {task.classes}")
    return question, prefix, references


def load(options: Options, *, name: str) -> Iterator[Record]:
    """Yield a record a context.

    Raises:
        FileNotFoundError, ValueError: see `Source.rows`; rows of another form.
    """
    task = TASKS[name]
    source = Source(
        folder="longbench",
        files=(f"{name}.jsonl", f"data/{name}.jsonl", f"{name}.parquet"),
        hub="THUDM/LongBench",
        archive=("data.zip", f"data/{name}.jsonl"),
        origin="https://huggingface.co/datasets/THUDM/LongBench (data.zip)",
    )
    pairs = ((row.text("context"), ask(task, row)) for row in source.rows(options))
    for context, asked in group_by_context(pairs, options):
        questions, prefixes, references = (list(column) for column in zip(*asked, strict=True))
        yield Record(
            context=task.context.replace("{context}", context),
            questions=questions,
            answers=references,
            max_new_tokens=task.max_new_tokens,
            task=f"longbench_{name}",
            answer_prefixes=prefixes,
        )


for _name, _task in TASKS.items():
    register(Dataset(f"longbench_{_name}", f"LongBench: {_task.summary}", partial(load, name=_name), _task.score))
