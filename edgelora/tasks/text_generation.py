"""text-generation: a causal language model learns the answers in chats, prompt/completion pairs or plain text.

Columns: `messages` (and `tools`), or `prompt` and `completion`, or `text`.
Batch: ids [T], starts [D + 1], positions [S], targets [S], all int64; D documents packed end to end, no padding, each without
its last token, which nothing comes after; the hidden state at positions[s] predicts the token targets[s].
Graph: input_ids, attention_mask int64, past_key_values.N.key/value fp32 [batch, kv_heads, past, head_dim] → logits fp32
[batch, positions, vocabulary], present.N.key/value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import Column, Example, Metrics, Predictor, Row, Task
from edgelora.tasks.generated import last_run, marked, perplexity, score_texts
from edgelora.tasks.rows import kind, message_problems, parse_json_cells, text_problems

if TYPE_CHECKING:
    import torch

    from edgelora.tokenizer import Tokenizer


class TextGeneration(Task):
    name = "text-generation"
    help = "A causal language model that answers: chat, data to text, commands to JSON."
    columns = (
        Column("messages", "chat: a list of {role, content}, system and tool turns included"),
        Column("tools", "what the chat may call: a list of JSON schemas"),
        Column("prompt", "what is asked: becomes a user turn where the tokenizer has a chat template"),
        Column("completion", "what is answered"),
        Column("text", "plain text, all of it trained"),
    )
    shapes = (("messages",), ("prompt", "completion"), ("text",))
    auto_class = "AutoModelForCausalLM"
    families = "Llama, Mistral, Qwen2/3, Gemma, Phi-3, SmolLM, OLMo2, Granite, GPT-2"
    metric = "loss"
    metrics = ("loss", "perplexity", "exact_match", "contains", "json_equal")
    higher_is_better = False
    target_modules = "all-linear"
    learning_rate = 1e-3

    def normalize(self, row: Row) -> Row:
        return parse_json_cells(
            {c.name: row[c.name] for c in self.columns if row.get(c.name) is not None}, ("messages", "tools")
        )

    def problems(self, row: Row) -> list[str]:
        if "messages" in row:
            found = message_problems(row["messages"])
            if "tools" in row and not isinstance(row["tools"], list):
                found.append(f'"tools" is a {kind(row["tools"])}; a list of JSON schemas is wanted')
            return found
        if "prompt" in row or "completion" in row:
            return text_problems(row, ("prompt", "completion"))
        return text_problems(row, ("text",))

    def encode(self, row: Row, tokenizer: Tokenizer, labels: Sequence[str]) -> Example:
        """Return ids int32 [T] and supervised uint8 [T]: 1 where the token is a target. The first token never is.

        What follows the last target is cut: nothing learns from it.
        """
        messages = self.messages(row, tokenizer)
        if messages is not None:
            ids, supervised = tokenizer.encode_chat_supervised(messages, row.get("tools"))
        else:
            completion = row["completion"] if "completion" in row else row["text"]
            ids, supervised = tokenizer.encode_supervised(row.get("prompt", ""), completion)
        mask = np.array(supervised, dtype=np.uint8)
        mask[:1] = 0
        length = int(mask.nonzero()[0][-1]) + 1 if mask.any() else len(mask)
        return Example({"ids": np.array(ids[:length], dtype=np.int32), "supervised": mask[:length]})

    def messages(self, row: Row, tokenizer: Tokenizer) -> list[dict[str, Any]] | None:
        """Return the row as a chat; None where it is plain text, or where a pair meets a tokenizer without a chat template."""
        if "messages" in row:
            return list(row["messages"])
        if "prompt" in row and tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": row["prompt"]}]
            return turns + ([{"role": "assistant", "content": row["completion"]}] if "completion" in row else [])
        return None

    def prompt_ids(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """Return what the model is given to answer a row {"prompt"}, {"messages"} or {"text"} when run."""
        messages = self.messages(row, tokenizer)
        if messages is None:
            return tokenizer.encode_prompt(str(row["prompt"] if "prompt" in row else row["text"]))
        turns = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return tokenizer.encode_chat(turns, tools=row.get("tools"), add_generation_prompt=True)

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        problems = super().example_problems(example, max_length)
        if not problems and not example.arrays["supervised"].any():
            problems.append("no supervised token: nothing to learn from")
        return problems

    def truncate(self, example: Example, max_length: int) -> Example:
        """Return the example cut to `max_length` tokens, and after the last target that is left."""
        cut = super().truncate(example, max_length)
        targets = cut.arrays["supervised"].nonzero()[0].tolist()
        return super().truncate(cut, targets[-1] + 1) if targets else cut

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, NDArray[Any]]:
        # In the arrays shifted by one, target t is the token after input t.
        positions = np.concatenate([e.arrays["supervised"][1:] for e in examples]).nonzero()[0]
        following = np.concatenate([e.arrays["ids"][1:] for e in examples])
        return {
            "ids": np.concatenate([e.arrays["ids"][:-1] for e in examples]).astype(np.int64),
            "starts": np.cumsum([0, *(len(example) - 1 for example in examples)], dtype=np.int64),
            "positions": positions.astype(np.int64),
            "targets": following[positions].astype(np.int64),
        }

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        hidden_TH = model.hidden(batch["ids"], batch["starts"])
        return model.nll(hidden_TH[batch["positions"]], batch["targets"]), len(batch["targets"])

    def evaluate(
        self,
        predictor: Predictor,
        rows: Sequence[Row],
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        labels: Sequence[str],
        *,
        generate: bool,
    ) -> Metrics:
        """Return loss (nats per supervised token) and perplexity; with `generate` the shares of answers that match.

        An answer is generated from the ids before the last supervised run of an example: its prompt, as when run.
        """
        losses = predictor.losses(examples)
        loss = sum(total for total, _ in losses) / sum(count for _, count in losses)
        metrics: Metrics = {"loss": loss, "perplexity": perplexity(loss)}
        asked = [example.arrays for row, example in zip(rows, examples, strict=True) if "text" not in row]
        if generate and asked:
            starts = [last_run(arrays["supervised"]) for arrays in asked]
            answers = [arrays["ids"][start:] for arrays, start in zip(asked, starts, strict=True)]
            prompts = [arrays["ids"][:start].tolist() for arrays, start in zip(asked, starts, strict=True)]
            limit = max(map(len, answers)) + 16  # Longer than any reference cannot match
            outputs = predictor.generate(prompts, limit, tokenizer.stop_token_ids)
            metrics |= score_texts([tokenizer.decode(o) for o in outputs], [tokenizer.decode(a.tolist()) for a in answers])
        return metrics

    def show(self, example: Example, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> str:
        return marked(example.arrays["ids"], example.arrays["supervised"], tokenizer)
