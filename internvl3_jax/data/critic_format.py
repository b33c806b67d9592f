r"""Splits solutions into steps, and makes the conversation in which a process reward model (critic)
judges them.

    user       ### Question:\n{question}\n\n### Solution Process:\n{first step}
    assistant  + or -
    user       {second step}
    assistant  + or -

as VisualPRM was trained; see InternVL's tools/reasoning_data_pipeline (visualprm_data_pipeline*.py,
utils/constants.py).
"""

from collections.abc import Sequence

from internvl3_jax.data.text.chat_template import IMAGE_TAG, Message

SEPARATOR = "\n\n"
GOOD, BAD = "+", "-"
# The system message of VisualPRM's training data, byte for byte.
SYSTEM = """You are an advanced AI assistant, designed to serve as a process supervision model. In this task, I will provide a problem \
statement followed by the first step of the solution process. For each subsequent turn, I will give you a new step in the solution. Your \
role is to assess whether the solution process is correct up to the current step.

- In the **first round**, I will input the problem and the first step of the solution process.
- In **each subsequent round**, I will provide the next step in the solution.

For each step, you should:

- Respond with **"+"** if you believe the solution process is correct up to this step.
- Respond with **"-"** if you detect any issues or errors in the process up to this step.

Please note:
- Only respond with **"+"** or **"-"**. Do not provide any additional explanations, comments, or justifications.

Your task is to verify the accuracy and correctness of each step in the given solution process."""

# As InternVL's trainer makes it of a row with one image: it looks for <image> in the first turn,
# which is the system's, and puts one in front of it, where it is text.
SYSTEM_AS_TRAINED = f"{IMAGE_TAG}\n{SYSTEM}"
# By the names that programs take.
SYSTEMS = {"visualprm": SYSTEM, "visualprm_trained": SYSTEM_AS_TRAINED}


def split_steps(solution: str, max_steps: int | None = None) -> list[str]:
    """Splits a solution at blank lines into at least one step.

    Steps without text are left out; InternVL's code gives them a turn without content.

    max_steps: Upper bound, by merging the same number of neighbors into each step.
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; it must be at least 1, or None for all steps")
    steps = [step for step in solution.split(SEPARATOR) if step.strip()] or [""]
    size = -(-len(steps) // max_steps) if max_steps else 1
    return [SEPARATOR.join(steps[start : start + size]) for start in range(0, len(steps), size)]


def critic_messages(
    question: str,
    steps: Sequence[str],
    labels: Sequence[str] | None = None,
    system: str | None = None,
) -> list[Message]:
    """Makes the conversation about a solution. The question has the tags of the images.

    labels: GOOD or BAD for each step; None takes GOOD as a placeholder. A critic's judgment of a
        step is read where its answer begins, with all earlier steps taken as right.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, (step, label) in enumerate(zip(steps, labels or [GOOD] * len(steps), strict=True)):
        text = (
            f"### Question:\n{question}\n\n### Solution Process:\n{step}" if number == 0 else step
        )
        turn = {"role": "user", "content": text}
        if IMAGE_TAG in step:  # a model wrote it, so that it is not the place of an image
            turn["images"] = question.count(IMAGE_TAG) if number == 0 else 0
        messages += [turn, {"role": "assistant", "content": label}]
    return messages
