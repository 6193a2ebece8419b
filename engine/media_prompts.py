"""Prompts → token ids, with the soft tokens of pictures and videos at the positions where placeholders stood.

A picture becomes begin-of-image, its soft tokens, end-of-image; a video becomes its frames, each after the time when it
was seen. Source: HF processing_gemma4, processing_gemma3.
"""

import re
from dataclasses import dataclass
from itertools import groupby

from engine.errors import PromptError
from engine.models.vision_spec import SiglipSpec
from engine.prompts import checked_ids
from engine.sequence import MediaRun

BLANK_LINE = "\n\n"         # what Gemma 3 sets around a picture in a text


@dataclass(frozen=True)
class _Slot:
    """Placeholders begin..end of `ids`, and what goes there: a Picture, or a whole video as [(seconds, Picture)]."""

    begin: int
    end: int
    what: str
    number: int
    media: object


class MediaPrompts:
    """Turns the Prompts of one model into token ids and MediaRuns.

    processor  PictureProcessor, or None where the model takes no media; then `refusal` says why

    In text every placeholder is expanded, as text. In token ids a picture is one placeholder id, which is expanded and
    gets begin- and end-of-image where they do not stand beside it; or it is the whole run of its soft tokens, which
    stays as it is. Of a video, a single placeholder that no begin-of-image precedes is all of it; any other run is a
    frame, which goes as a picture does.
    """

    def __init__(self, spec, tokenizer, processor, refusal="the model takes text only"):
        self.vocab, self.media, self.tokenizer, self.processor = spec.vocab, spec.media, tokenizer, processor
        self.refusal = refusal
        self._spelled = {}
        if self.media is not None and tokenizer is not None:
            ids = (self.media.image_token, self.media.video_token, self.media.begin_image, self.media.end_image)
            self._spelled = {i: tokenizer.special_text(i) for i in ids if i is not None}

    def ids(self, prompt):
        """(token ids, MediaRuns by position) of a Prompt. Raises PromptError."""
        is_text = isinstance(prompt.content, str)
        if self.media is None and (prompt.images or prompt.videos):
            raise PromptError(f"images and videos came with {prompt.origin}, and {self.refusal}")
        if self.media is None:
            return (self._encode(prompt, prompt.content) if is_text else checked_ids(prompt.content, self.vocab)), []
        if self.media.video_token is None and prompt.videos:
            raise PromptError(f"videos came with {prompt.origin}, and the model takes none; pass frames as images")
        if is_text:
            self._check_text(prompt)
            images, videos = self._decoded(prompt)
            ids = self._encode(prompt, self._expanded(prompt.content, images, videos))
            self._check_ids(prompt, ids)
        else:
            ids = checked_ids(prompt.content, self.vocab)
            self._check_ids(prompt, ids)
            images, videos = self._decoded(prompt)
        return self._placed(ids, self._image_slots(ids, images) + self._video_slots(prompt, ids, videos), prompt)

    # --- what came is counted before any of it is decoded

    def _check_text(self, prompt):
        if self.tokenizer is None:
            raise PromptError("the prompt is text, but the checkpoint has no tokenizer files; pass token ids")
        for what, sources, token in (("image", prompt.images, self._text_slot),
                                     ("video", prompt.videos, self.media.video_token)):
            spelled = self._spelled.get(token)
            if spelled is None and sources:
                raise PromptError(f"the tokenizer has no token {token}, which stands for a {what} in a text; pass "
                                  "token ids")
            n = prompt.content.count(spelled) if spelled else 0
            if n != len(sources):
                raise _miscounted(prompt, n, what, spelled, len(sources))

    def _check_ids(self, prompt, ids):
        for what, sources, token in (("image", prompt.images, self.media.image_token),
                                     ("video", prompt.videos, self.media.video_token)):
            n = len(_runs(ids, token, len(sources)))
            is_one_each = what == "image" or not sources            # a video may also be a run for each frame
            if n < len(sources) or (is_one_each and n > len(sources)):
                raise _miscounted(prompt, n, what, f"token {token}", len(sources))

    def _decoded(self, prompt):
        """(a Picture for each image, [(seconds, Picture)] for each video)"""
        return ([_named(f"image {i}", self.processor.image, source, prompt.image_tokens)
                 for i, source in enumerate(prompt.images)],
                [_named(f"video {i}", self.processor.video, source, prompt.video_tokens)
                 for i, source in enumerate(prompt.videos)])

    # --- text

    def _encode(self, prompt, text):
        if self.tokenizer is None:
            raise PromptError("the prompt is text, but the checkpoint has no tokenizer files; pass token ids")
        if not text:
            raise PromptError("the prompt is empty; to begin from nothing pass the id of the begin-of-text token",
                              n_tokens=0)
        return checked_ids(self.tokenizer.encode(text, add_special_tokens=not prompt.is_rendered), self.vocab)

    @property
    def _text_slot(self):
        """Id of the token that stands for a picture in a text."""
        return self.media.begin_image if isinstance(self.media.tower, SiglipSpec) else self.media.image_token

    def _expanded(self, text, images, videos):
        """`text` with pictures and videos written out in place of their placeholders, in one pass."""
        around = BLANK_LINE if isinstance(self.media.tower, SiglipSpec) else ""
        written = {}
        if images:
            written[self._spelled[self._text_slot]] = iter(
                [around + self._spell(self.media.image_token, picture) + around for picture in images])
        if videos:
            written[self._spelled[self.media.video_token]] = iter([self._spell_video(video) for video in videos])
        return re.sub("|".join(map(re.escape, written)), lambda slot: next(written[slot[0]]), text) if written else text

    def _spell(self, token, picture):
        """A picture in text: begin-of-image, `token` for each of its soft tokens, end-of-image."""
        parts = [(self.media.begin_image, 1), (token, picture.n_tokens), (self.media.end_image, 1)]
        if missing := [i for i, _ in parts if self._spelled.get(i) is None]:
            raise PromptError(f"the tokenizer has no token {missing[0]}, which a picture in a text needs; pass token "
                              "ids")
        return "".join(self._spelled[i] * n for i, n in parts)

    def _spell_video(self, video):
        """A video in text: its frames, each after its time in minutes and seconds."""
        return " ".join(f"{int(seconds // 60):02}:{int(seconds % 60):02} {self._spell(self.media.video_token, picture)}"
                        for seconds, picture in video)

    # --- token ids

    def _image_slots(self, ids, images):
        runs = _runs(ids, self.media.image_token, len(images))
        return [_Slot(*run, "image", i, picture) for run, (i, picture) in zip(runs, enumerate(images), strict=True)]

    def _video_slots(self, prompt, ids, videos):
        runs, slots, at = _runs(ids, self.media.video_token, len(videos)), [], 0
        for i, video in enumerate(videos):
            is_whole = at < len(runs) and self._is_bare(ids, *runs[at])
            media = [video] if is_whole else [picture for _, picture in video]
            slots += [_Slot(*run, "video", i, one) for run, one in zip(runs[at:], media, strict=False)]
            at += len(media)
        if at != len(runs):
            frames = ", ".join(str(len(video)) for video in videos)
            raise PromptError(f"{prompt.origin} has {len(runs)} video placeholders (runs of token "
                              f"{self.media.video_token}) for {len(videos)} videos of {frames} frames; expected one "
                              "for each video, or one for each frame")
        return slots

    def _is_bare(self, ids, begin, end):
        """Whether a run is a single placeholder that no begin-of-image marks as a frame."""
        return end - begin == 1 and ids[begin - 1:begin] != [self.media.begin_image]

    def _placed(self, ids, slots, prompt):
        """`ids` with every slot filled, and where the pictures stand in them."""
        out, runs, at = [], [], 0
        for slot in sorted(slots, key=lambda slot: slot.begin):
            out += ids[at:slot.begin]
            at = slot.end
            if isinstance(slot.media, list):
                self._place_video(out, runs, slot.media)
                continue
            n, n_wanted, token = slot.end - slot.begin, slot.media.n_tokens, ids[slot.begin]
            if n not in (1, n_wanted):
                raise self._misfit(prompt, slot, n)
            if n == 1 and out[-1:] != [self.media.begin_image]:
                out.append(self.media.begin_image)
            runs.append(MediaRun(len(out), slot.media))
            out += [token] * n_wanted
            if n == 1 and ids[at:at + 1] != [self.media.end_image]:
                out.append(self.media.end_image)
        return out + ids[at:], runs

    def _place_video(self, out, runs, video):
        if self.tokenizer is None:
            raise PromptError("a video as one token needs a tokenizer, for the times of its frames, and the checkpoint "
                              "has none; pass a whole run of tokens for each frame")
        ids = checked_ids(self.tokenizer.encode(self._spell_video(video), add_special_tokens=False), self.vocab)
        starts = [begin for begin, _ in _runs(ids, self.media.video_token)]
        runs += [MediaRun(len(out) + begin, picture) for begin, (_, picture) in zip(starts, video, strict=True)]
        out += ids

    def _misfit(self, prompt, slot, n):
        """The error of a run of n placeholders for a picture of another size: it names the budgets that would do."""
        budgets = self.media.tower.budgets
        fits = [str(budget) for budget in budgets if self._n_tokens(prompt, slot, budget) == n]
        return PromptError(f"{slot.what} {slot.number} takes {slot.media.n_tokens} soft tokens, and its run of "
                           f"placeholders in {prompt.origin} has {n}; "
                           + (f"{slot.what}_tokens={' or '.join(fits)} gives {n}" if fits else
                              f"no budget of {', '.join(map(str, budgets))} gives {n}"))

    def _n_tokens(self, prompt, slot, budget):
        """Soft tokens of what is in the slot, had it been asked for with another budget; 0 where it cannot be."""
        try:
            if slot.what == "image":
                return self.processor.image(prompt.images[slot.number], budget).n_tokens
            return self.processor.video(prompt.videos[slot.number], budget)[0][1].n_tokens
        except PromptError:                             # too large for the tower's positions
            return 0


def _runs(ids, token, n_media=0):
    """[(begin, end)] of the placeholders `token`: the runs of it, or each one where there are as many as media."""
    n_all = ids.count(token)
    if n_all == n_media:
        return [(i, i + 1) for i, value in enumerate(ids) if value == token]
    at, runs = 0, []
    for value, group in groupby(ids):
        n = len(list(group))
        if value == token:
            runs.append((at, at + n))
        at += n
    return runs


def _named(name, process, source, budget):
    """process(source, budget); its errors then say which picture or video they are about."""
    try:
        return process(source, budget)
    except PromptError as error:
        raise PromptError(f"{name}: {error}") from error


def _miscounted(prompt, n_slots, what, slot, n_media):
    return PromptError(f"{prompt.origin} has {n_slots} {what} placeholder{'s' * (n_slots != 1)} ({slot}) for {n_media} "
                       f"{what}{'s' * (n_media != 1)}; expected one for each")
