"""Recipes of one's own in a comparison: picked, pasted or uploaded, and kept in the link."""

from __future__ import annotations

import streamlit as st

from analysis.comparison.run import adapt_recipe, label_of, usable_methods
from merge_core.errors import MergeScopeError
from merge_core.merging.engine import check_recipe
from merge_core.merging.recipe import Recipe, make_recipe, recipe_from_query, recipe_from_yaml
from ui.controls import selectbox
from ui.controls import text as text_control
from ui.plain_text import code, plain, show_warning
from ui.server.resources import View
from ui.widgets import controls

KEY = "own"
UPLOADS = "_own_uploads"
PROBLEMS = "_own_problems"
UPLOAD_MB = 1
MOST_RECIPES = 50  # each has a row of its own, and is merged and evaluated


def own_recipes(view: View) -> list[Recipe]:
    """Widgets for recipes beside the chosen methods.

    Args:
        view: the suite and tasks that the recipes are merged on, whatever they name themselves.

    Returns:
        Those that can be merged here, different ones; what is wrong with others is said.
    """
    with st.expander("Your own recipes", icon=":material/playlist_add:"):
        left, right = st.columns(2, gap="large")
        with left:
            _pick(view)
        with right:
            found = _list_entered(view)
    return found


def parse_recipes(text: str) -> list[tuple[str, Recipe | MergeScopeError]]:
    """Recipes in a text: one YAML document (several with ``---`` between), or a link a line.

    Returns:
        Each recipe's text, and the recipe or what is wrong with it; of more than
        :data:`MOST_RECIPES` the first ones, and that there are more.
    """
    lines = [line.rstrip() for line in text.strip().splitlines()]
    is_yaml = any(line.startswith("method:") for line in lines)
    parts = "\n".join(lines).split("\n---\n") if is_yaml else [line for line in lines if line]
    found: list[tuple[str, Recipe | MergeScopeError]] = []
    if len(parts) > MOST_RECIPES:
        most = MergeScopeError(
            f"{len(parts):,} recipes are more than {MOST_RECIPES}; the others are left out."
        )
        found.append((parts[MOST_RECIPES], most))
    for part in parts[:MOST_RECIPES]:
        try:
            recipe = (
                recipe_from_yaml(part) if is_yaml else recipe_from_query(part.rpartition("?")[2])
            )
        except MergeScopeError as error:
            found.append((part, error))
        else:
            found.append((part, recipe))
    return found


def link_form(recipe: Recipe) -> str:
    """A recipe as a line of the text, for whatever tasks are chosen."""
    return recipe.model_copy(update={"tasks": None}).to_query()


def _add(recipes: list[Recipe]) -> None:
    """Add recipes to the text (called between two runs of the page)."""
    text = st.session_state.get(KEY, "")
    lines = [link_form(r) if isinstance(r, Recipe) else part for part, r in parse_recipes(text)]
    lines += map(link_form, recipes)
    st.session_state[KEY] = "\n".join(dict.fromkeys(lines))


def _remove(place: int) -> None:
    kept = [entry for i, entry in enumerate(parse_recipes(st.session_state[KEY])) if i != place]
    st.session_state[KEY] = "\n".join(
        link_form(recipe) if isinstance(recipe, Recipe) else part for part, recipe in kept
    )


def _upload(key: str) -> None:
    """Take the uploaded files in, and empty the uploader."""
    recipes, problems = [], []
    for file in st.session_state[key]:
        try:
            if file.size > UPLOAD_MB << 20:
                raise MergeScopeError(f"{file.name} is larger than {UPLOAD_MB} MB.")
            text = file.getvalue().decode("utf-8", errors="replace")
            recipes.append(recipe_from_yaml(text, file.name))
        except MergeScopeError as error:
            problems.append(str(error))
    _add(recipes)
    st.session_state[PROBLEMS] = problems
    st.session_state[UPLOADS] = st.session_state.get(UPLOADS, 0) + 1


def _pick(view: View) -> None:
    """A method and its parameters, to be added."""
    offered = usable_methods(view.suite, view.tasks)
    name = selectbox(
        "Method", offered, "own_method", rest="cart", words=lambda name: offered[name].title
    )
    method = offered[name]
    recipe = make_recipe(
        {"suite": view.name, "method": name, "parameters": controls(method, "own_")}
    )
    st.button(
        "Add to the comparison",
        key="own_add",
        on_click=_add,
        args=([recipe],),
        icon=":material/add:",
        width="stretch",
    )


def _list_entered(view: View) -> list[Recipe]:
    """The recipes in the text, each with a button that removes it."""
    text = text_control(
        "In the comparison, one a line",
        KEY,
        lines=True,
        height=100,
        placeholder="method=cart&rank=0.16&scale=3",
        help="A recipe as a link's query, as the Merge lab's link to this page gives it, or a "
        "recipe's YAML. It is compared as it is, on the suite and tasks chosen here.",
    )
    found: dict[str, Recipe] = {}
    for place, (part, recipe) in enumerate(parse_recipes(text)):
        label, problem = part[:60], ""
        try:
            if isinstance(recipe, MergeScopeError):
                raise recipe
            recipe = adapt_recipe(recipe, view.name, view.tasks)
            check_recipe(view.suite, recipe)
            label = label_of(recipe)
            found[label] = recipe
        except MergeScopeError as error:
            problem = str(error)
        words, button = st.columns([3, 1], vertical_alignment="center")
        if problem:
            words.warning(f"{code(label)} is left out. {plain(problem)}")
        else:
            words.markdown(plain(label))
        button.button("Remove", key=f"own_remove_{place}", on_click=_remove, args=(place,))
    key = f"own_files_{st.session_state.get(UPLOADS, 0)}"
    st.file_uploader(
        "Or recipe files (YAML)",
        ["yaml", "yml"],
        accept_multiple_files=True,
        key=key,
        on_change=_upload,
        args=(key,),
        max_upload_size=UPLOAD_MB,
    )
    for problem in st.session_state.pop(PROBLEMS, []):
        show_warning(problem)
    return list(found.values())
