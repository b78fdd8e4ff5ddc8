"""A page that shows strangers' texts in every way in which pages show texts."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import streamlit as st

from ui import charts, plain_text
from ui.plain_text import code, plain

HOST = "evil.example"
TEXTS = (
    f"![x](http://{HOST}/p.png)",
    f"[Session expired](http://{HOST}/login)",
    f"![x][y] [y]: http://{HOST}/p.png",
    f"http://{HOST}/a", f"https://{HOST}", f"HTTPS://{HOST}/a b", f"www.{HOST}", f"WWW.{HOST}/x",
    f"(http://{HOST})", f"a@{HOST}", f"mailto:a@{HOST}", f"xmpp:a@{HOST}/b", f"<http://{HOST}>",
    f"<img src='http://{HOST}/p.png'>", f"<a href='http://{HOST}'>x</a>", "<!-- hidden -->",
    f"`code` ` [x](http://{HOST}) `", f"``` [x](http://{HOST})", "~~~ a", "~~b~~ ~c~",
    f"a\\[x](http://{HOST})", f"\\![x](http://{HOST}/p.png)", f"\\\\[x](http://{HOST})",
    f"]({HOST})", f"**]**(http://{HOST})", "$x^2$ $$y$$ \\$z\\$", "a $5 and $6",
    ":red[alarm] :red-badge[x] :material/home: :smile: :+1: :streamlit: :a:b:", "::help{x} :::y",
    ":color[x]{background='red'} :small[x] :shimmer[x] :help[y] a:red b:c",
    "# big", "> quoted", "- item", "+ item", "1. item", "2) item", "--- ", "===", "    indented",
    "a\n\n# big\n\n- list", "| a | b |\n|---|---|\n| c | d |", "*a* _b_ __c__ ***d*** e_f_g a__b",
    f"&lt;img&gt; &#60;a&#62; &amp; &#x77;ww.{HOST} http&#58;//{HOST}", "a  \nb\\\nc",
    f"[^1] [^1]: http://{HOST}", f"x\u202ehttp://{HOST}", "a\x00b\x1b[31m", "half \ud800 pair",
    "vit_base/blocks.0.attn.qkv.weight", "a -> b", "__init__", "_x_", "C:\\models\\a", "\\", "`",
)  # fmt: skip


def draw(names: Sequence[str]) -> go.Figure:
    figure = go.Figure(go.Bar(x=names, y=[1] * len(names), text=names, textposition="inside"))
    return figure.update_layout(title_text="<br>".join(names), showlegend=True)


if __name__ == "__main__":
    from tests.browser import foreign_texts  # figures are made by functions of modules

    for number, text in enumerate(TEXTS):
        with st.container(key=f"text-{number}"):
            st.markdown(plain(text))
        with st.container(key=f"inner-{number}"):
            st.markdown(f"**a** {plain(text)} **{plain(text)}** *{plain(text)}*")
            st.markdown(code(text))
            st.caption(plain(text), help=plain(text))
            st.metric(plain(text), 1, help=plain(text))
            st.checkbox(plain(text), key=f"box-{number}")
            option = text.replace("\ud800", "")
            st.pills(plain(text), [option], format_func=plain, key=f"pills-{number}")
    with st.expander(plain(TEXTS[0])):
        plain_text.show_error(TEXTS[0])
        plain_text.show_warning(TEXTS[1])
        plain_text.show_info(TEXTS[3])
    st.tabs([plain(text) for text in TEXTS])
    names = [text for text in TEXTS if text.isprintable()]
    figure = charts.drawn(foreign_texts.draw, names)
    charts.panel(charts.Chart(figure, key="figure", alt="Names"))
    st.markdown("The end.")
