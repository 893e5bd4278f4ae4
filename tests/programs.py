"""What programs are made of: traced operations, compiled operations, memory. All that reads the
text of a jaxpr, of StableHLO or of HLO is here."""

import re

import jax


def float32_arrays(function, *arguments, of: str = r"[\w-]+") -> set[tuple[int, ...]]:
    """Shapes of the float32 arrays that primitives of this name make as the function is traced."""
    program = str(jax.make_jaxpr(function)(*arguments))
    made = re.findall(rf"f32\[([\d,]*)\] = {of}\b", program)
    return {tuple(int(n) for n in shape.split(",") if n) for shape in made}


def operations(program: jax.stages.Lowered | jax.stages.Compiled) -> set[str]:
    """Names of all operations of a program."""
    if isinstance(program, jax.stages.Lowered):
        return set(re.findall(r"stablehlo\.(\w+)", program.as_text()))
    line = r"^ *(?:ROOT )?%?[\w.-]+ = .*? ([a-z][\w-]*)\("
    return set(re.findall(line, program.as_text(), re.MULTILINE))


def operations_on(compiled: jax.stages.Compiled, shape) -> list[str]:
    """Name of every operation that makes a float32 array of this shape."""
    text = compiled.as_text()
    shape = ",".join(map(str, shape))
    made = re.findall(rf"= f32\[{shape}\](?:{{[\d,]*}})? ([\w-]+)\((.*)$", text, re.MULTILINE)
    names = []
    for name, rest in made:
        if name == "fusion":  # named by what it gives
            inside = re.search(r"calls=%([\w.-]+)", rest)[1]
            body = text.split(f"%{inside} (")[1].split("\n}")[0]
            name = re.search(r"ROOT .*? = \S+ ([\w-]+)\(", body)[1]
        names.append(name)
    return names


def has_arrays(compiled: jax.stages.Compiled, *last: int) -> bool:
    """Whether it makes arrays whose last axes are of these sizes."""
    return f",{','.join(map(str, last))}]" in compiled.as_text()


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """What it needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def reused_bytes(compiled: jax.stages.Compiled) -> int:
    """What of its results lies where its arguments were."""
    return compiled.memory_analysis().alias_size_in_bytes
