"""How a prompt's text becomes what the base reads: continued as it stands, or answered as a user's request."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Form:
    """What stands around a prompt.

    Attributes:
        chat: whether the text is a user's request, put into the base's chat template, rather than text to continue.
        system: the system message of a chat; None leaves it to the template.
        turns: earlier (request, response) exchanges of a chat.
        before: what stands before a text to continue, white space at its end included.
    """

    chat: bool = False
    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    before: str = ""

    def messages(self, text: str) -> list[dict[str, str]]:
        """The chat as templates take it, the request `text` last."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        earlier = [
            message
            for request, response in self.turns
            for message in ({"role": "user", "content": request}, {"role": "assistant", "content": response})
        ]
        return [*system, *earlier, {"role": "user", "content": text}]


PLAIN, CHAT = Form(), Form(chat=True)


@dataclass(frozen=True)
class Guidance:
    """What a model is told before every prompt, whatever the prompt's form.

    Attributes:
        system: system message of chats; None leaves it to the template.
        turns: exemplary (request, response) exchanges of chats.
        before: what stands before texts to continue, white space at its end included.
    """

    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    before: str = ""

    def around(self, form: Form) -> Form:
        """A prompt's form with the guidance in it."""
        if form.chat:
            return replace(
                form, system=self.system if form.system is None else form.system, turns=self.turns + form.turns
            )
        return replace(form, before=self.before + form.before)


UNGUIDED = Guidance()
