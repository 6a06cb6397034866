"""Tokenizers from GGUF metadata and from Hugging Face folders, incremental decoding, and chat templates."""

import copy
import datetime
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from retention.checkpoints.huggingface import read_json
from retention.runs import digest

END_OF_TEXT = "<|endoftext|>"
PROBES = ("zq1question", "zq2answer", "zq3message")  # words that no chat template has of its own, to see what it writes around them

# Values of tokenizer.ggml.token_type. The rest (ordinary, unknown, unused, byte) needs no special treatment in a byte-level vocabulary.
CONTROL, USER_DEFINED = 3, 4

# How Llama 3 and Qwen2 cut text into words before merging; they differ in the digits that form one word.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS % digits), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "llama-bpe": lambda: _words("{1,3}"),
    "qwen2": lambda: _words(""),
}


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      vocab_size: the number of tokens, special ones included. A model's embedding table may have more rows (padding).
      largest_id: the largest id of a token, for which the table must have a row; added tokens, of which some models use none, are not counted.
      eos_ids: the ids that end a text or a turn.
      date: the day that `chat` tells templates which ask for it; None: today.
      chat_template: in Jinja, or None.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        eos_ids: Sequence[int],
        bos_token: str = "",
        eos_token: str = "",
        chat_template: str | None = None,
    ):
        self._tokenizer = tokenizer
        self._special = {"bos_token": bos_token, "eos_token": eos_token}
        self._bos_id = tokenizer.token_to_id(bos_token) if bos_token else None
        self.chat_template = chat_template
        self.date: datetime.datetime | None = None
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.largest_id: int = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        added = tokenizer.get_added_tokens_decoder()
        # Some files have the token that ends a turn among ordinary ones, so that a text could end one and answers would show it.
        ends = [token for token_id in eos_ids if (token := added.get(token_id)) and not token.special]
        if ends:
            tokenizer.add_special_tokens(ends)
            added = tokenizer.get_added_tokens_decoder()
        special = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        self._special_names = re.compile("|".join(map(re.escape, special))) if special else None
        end_of_text = [token_id for token_id, token in added.items() if token.special and token.content == END_OF_TEXT]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_ids, *end_of_text]))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Builds the byte-level BPE that a GGUF file's `tokenizer.*` metadata describes.

        Raises:
          NotImplementedError: another kind of model than "gpt2" (byte-level BPE), or a pre-tokenizer that is not one of PRE_TOKENIZERS.
          ValueError: a key is missing, or at odds with another.
        """

        def value(key: str) -> Any:
            if f"tokenizer.ggml.{key}" not in metadata:
                raise ValueError(f"the GGUF metadata has no tokenizer.ggml.{key}, which its tokenizer needs")
            return metadata[f"tokenizer.ggml.{key}"]

        if value("model") != "gpt2":
            raise NotImplementedError(f"GGUF tokenizer model {value('model')!r} is not supported; gpt2 (byte-level BPE) is")
        pre = value("pre")
        if pre not in PRE_TOKENIZERS:
            raise NotImplementedError(f"GGUF pre-tokenizer {pre!r} is not supported; {', '.join(PRE_TOKENIZERS)} are")
        tokens, kinds, merges = value("tokens"), value("token_type"), value("merges")
        if len(kinds) != len(tokens):
            raise ValueError(f"the GGUF metadata has {len(tokens)} tokenizer.ggml.tokens and {len(kinds)} of tokenizer.ggml.token_type, which go in pairs")
        ids = {key: metadata[f"tokenizer.ggml.{key}"] for key in ("bos_token_id", "eos_token_id", "eot_token_id") if f"tokenizer.ggml.{key}" in metadata}
        for key, token_id in ids.items():
            if not 0 <= token_id < len(tokens):
                raise ValueError(f"the GGUF metadata has tokenizer.ggml.{key} = {token_id}, which is none of its {len(tokens)} tokens")
        vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
        try:
            # Llama 3 takes a word that is a token as it stands, even where its merges do not lead there.
            model = models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ", 1)) for merge in merges], ignore_merges=pre == "llama-bpe")
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"the GGUF metadata's tokenizer.ggml.merges are not those of its tokens ({error})") from error
        tokenizer = tokenizers.Tokenizer(model)
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
        tokenizer.decoder = decoders.ByteLevel()
        eos_ids = [ids[key] for key in ("eos_token_id", "eot_token_id") if key in ids]
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            if kind == CONTROL or token_id in eos_ids:  # some files have what ends a turn among the ordinary ones
                tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False)])
            elif kind == USER_DEFINED:
                tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False)])

        bos_token, eos_token = (tokens[ids[key]] if key in ids else "" for key in ("bos_token_id", "eos_token_id"))
        # Llama 3 files may leave the flag out; their models were trained with the token.
        if bos_token and metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
            tokenizer.post_processor = _begin_with(bos_token, vocabulary[bos_token])
        return cls(tokenizer, eos_ids, bos_token, eos_token, metadata.get("tokenizer.chat_template"))

    @classmethod
    def from_folder(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads tokenizer.json of a Hugging Face folder, and what tokenizer_config.json, chat_template.jinja, config.json and
        generation_config.json say about special tokens and the chat template, where they exist.

        Raises:
          FileNotFoundError: no tokenizer.json.
          ValueError: a file that is not what its name says, or an add_bos_token without a bos_token that is one of the tokens.
          NotImplementedError: an add_bos_token beside a tokenizer.json that adds other tokens.
        """
        folder = pathlib.Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"there is no tokenizer.json in {folder}: only fast tokenizers are supported")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{file} is not a tokenizer that the tokenizers package can read ({error})") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()

        def optional(name: str) -> dict[str, Any]:
            return read_json(folder / name) if (folder / name).is_file() else {}

        config = optional("tokenizer_config.json")

        def token(key: str) -> str:
            entry = config.get(key) or ""
            name = entry.get("content") if isinstance(entry, dict) else entry
            if not isinstance(name, str):
                raise ValueError(f"{folder}/tokenizer_config.json has {key} = {entry!r}, which must be a token's name")
            return name

        # The names of tokens that are in the vocabulary, and which tokenizer.json does not say are taken whole, as transformers takes them.
        listed = config.get("added_tokens_decoder") or {}
        for name in filter(None, [token("eos_token"), *(entry["content"] for entry in listed.values())]):
            if tokenizer.token_to_id(name) is None:
                raise NotImplementedError(f"{folder}/tokenizer_config.json has a token {name!r} that tokenizer.json lacks, which is not supported")
        whole = {entry.content for entry in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([tokenizers.AddedToken(**entry) for entry in listed.values() if entry["content"] not in whole])
        if token("eos_token") and token("eos_token") not in whole:
            tokenizer.add_special_tokens([tokenizers.AddedToken(token("eos_token"), normalized=False)])

        # What tokenizer.json adds stays; some files leave the token that begins a text to this flag alone (DeepSeek-R1's distilled models).
        if config.get("add_bos_token"):
            bos_id, added = tokenizer.token_to_id(token("bos_token")), tokenizer.encode("").ids
            if bos_id is None:
                raise ValueError(f"{folder}/tokenizer_config.json has add_bos_token, but its bos_token {token('bos_token')!r} is no token of tokenizer.json")
            if added and bos_id not in added:
                raise NotImplementedError(f"{folder}/tokenizer_config.json has add_bos_token where tokenizer.json adds other tokens, which is not supported")
            if not added:
                tokenizer.post_processor = _begin_with(token("bos_token"), bos_id)
        eos_ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            entry = optional(name).get("eos_token_id")
            eos_ids += entry if isinstance(entry, list) else [] if entry is None else [entry]
        if (token_id := tokenizer.token_to_id(token("eos_token"))) is not None:
            eos_ids.append(token_id)
        template = config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(tokenizer, eos_ids, token("bos_token"), token("eos_token"), template)

    def digest(self) -> str:
        """What tells this tokenizer, with its chat template, from others: 16 hexadecimal digits."""
        return digest(part.encode() for part in (self._tokenizer.to_str(), repr(self._special), repr(self.eos_ids), self.chat_template or ""))

    def encode(self, text: str, special: bool = True, bos: bool = True) -> list[int]:
        """The token ids of `text`.

        Args:
          text: any string.
          special: whether names of special tokens in the text, such as <|im_start|>, stand for these tokens. False for untrusted text.
          bos: whether to begin with what the tokenizer puts before a text (for most models nothing). False for text that continues another.
        """
        self._tokenizer.encode_special_tokens = not special
        ids = self._tokenizer.encode(text, add_special_tokens=bos).ids
        # A chat template may have written the token that the tokenizer then adds.
        return ids[1:] if self._bos_id is not None and ids[:2] == [self._bos_id] * 2 else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out. Bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation in the model's own chat format.

        Args:
          messages: each has a "role" ("system", "user" or "assistant") and a "content".
          add_generation_prompt: whether to end with the opening of the assistant's next turn.

        Raises:
          ValueError: the model has no chat template, or its template does not take these messages.
        """
        if self.chat_template is None:
            raise ValueError("chat needs a chat template, and this model has none: use plain text (chat=False)")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise ValueError(f'chat messages are dicts with "role" and "content", not {message!r}')
        today = self.date or datetime.datetime.now()
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, "strftime_now": today.strftime, **self._special}
        try:
            return _template(self.chat_template).render(tools=None, documents=None, **variables)
        except Exception as error:  # a template is code, and may add a text to a number
            raise ValueError(f"the model's chat template does not take these messages: {error}") from error

    def turn(self) -> tuple[str, str]:
        """What `chat` puts before a conversation's first user message, and what between it and the answer. Raises ValueError as `chat`."""
        opening, closing = _around(self.chat([{"role": "user", "content": PROBES[0]}]), PROBES[0])
        return opening, closing

    def between(self) -> tuple[str, str, str]:
        """What `chat` puts between a user's message and an answer that others follow, the token that ends this answer, and the rest up to the next message.

        Raises ValueError as `chat`, and where no token of `eos_ids` ends the answer.
        """
        roles = ("user", "assistant", "user")
        text = self.chat([{"role": role, "content": content} for role, content in zip(roles, PROBES, strict=True)])
        before, between = _around(_around(text, PROBES[2])[0], PROBES[1])
        asked = _around(before, PROBES[0])[1]
        names = [self._tokenizer.id_to_token(token_id) for token_id in self.eos_ids]
        ends = [between.index(name) + len(name) for name in names if name and name in between]
        if not ends:
            raise ValueError(f"the model's chat template puts {between!r} behind an answer, which holds none of the tokens that end a turn: {names}")
        return asked, between[: min(ends)], between[min(ends) :]

    def opening(self, text: str) -> str:
        """A conversation that begins with a user's message, up to the answer; names of special tokens are left out of it. Raises ValueError as `chat`."""
        return self.chat([{"role": "user", "content": self.plain(text)}])

    def following(self, text: str, close: bool) -> str:
        """A user's message behind an answer, which `close` ends first, up to the next answer: as `opening` writes it.

        Raises ValueError as `between`, and for a template that writes a user's message otherwise at a conversation's beginning.
        """
        (opening, _), (_, end, again), first = self.turn(), self.between(), self.opening(text)
        if not first.startswith(opening):
            raise ValueError("the model's chat template begins conversations in several ways, so that none can go on; use plain text (chat=False)")
        return (end if close else "") + again + first.removeprefix(opening)

    def at(self, date: datetime.datetime) -> "Tokenizer":
        """The same tokenizer, for which it is that day."""
        other = copy.copy(self)
        other.date = date
        return other

    def plain(self, text: str) -> str:
        """The text without the names of special tokens, which `encode` would take for these tokens."""
        while self._special_names and (shorter := self._special_names.sub("", text)) != text:
            text = shorter  # a name around another is a name once that is gone
        return text


def _around(text: str, message: str) -> list[str]:
    """What a chat template wrote before a message and after it. Raises ValueError where it is not there."""
    parts = text.rsplit(message, 1)
    if len(parts) < 2:
        raise ValueError(f"the model's chat template does not write a message as it is: of {message!r} it makes {text!r}; use plain text (chat=False)")
    return parts


def _begin_with(token: str, token_id: int) -> processors.PostProcessor:
    """What puts this token before a text."""
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])


class StreamDecoder:
    """Decodes ids that arrive one by one into pieces of text, whose sum is the text of all the ids.

    A character may be spread over several tokens, so what is not yet complete UTF-8 is held back.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0  # of _ids, how many have been given out; they stay as context, since some decoders treat the first token differently

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that it completes: often none, "" then."""
        self._ids.append(int(token_id))
        text = self._pending()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        return text

    def finish(self) -> str:
        """What is still held back, incomplete characters as U+FFFD; then the decoder is as new."""
        text = self._pending()
        self._ids, self._done = [], 0
        return text

    def _pending(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._done])) :]


@functools.lru_cache(maxsize=8)
def _template(source: str) -> jinja2.Template:
    """Templates come with the weights, from anywhere: they run in the sandbox."""
    extensions = [jinja2.ext.loopcontrols, _Generation]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals |= {"raise_exception": _raise_exception}
    environment.filters["tojson"] = _tojson
    return environment.from_string(source)


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, by which templates mark what an assistant says: it is written as it stands."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """As transformers has it: jinja's own is for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
