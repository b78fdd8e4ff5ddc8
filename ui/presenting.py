"""Presenter mode: larger type, no sidebar, and keys that turn pages."""

from __future__ import annotations

import streamlit as st

from ui.controls import toggle

STATE = "present"  # in the address
FACTOR = 1.6
LABEL = "Presenter mode"
SCRIPT = """
export default function ({ data }) {
  const root = document.documentElement;
  root.classList.toggle("mergescope-presenting", data.on);
  if (!document.getElementById("mergescope-presenting")) {
    const style = document.createElement("style");
    style.id = "mergescope-presenting";
    style.textContent = `
      .mergescope-presenting { font-size: ${data.size}%; }
      .mergescope-presenting [data-testid="stSidebar"],
      .mergescope-presenting [data-testid="stExpandSidebarButton"] { display: none; }`;
    document.head.append(style);
  }
  if (window.mergescopePresenting) return;
  window.mergescopePresenting = true;
  const typed =
    "input, textarea, select, [contenteditable], [role=slider], [role=radio], [role=tab]";
  document.addEventListener("keydown", (event) => {
    if (!root.classList.contains("mergescope-presenting") || event.target.closest(typed)) return;
    const links = [...document.querySelectorAll('[data-testid="stSidebarNavLink"]')];
    const here = links.findIndex((link) => link.getAttribute("aria-current") === "page");
    const step = { ArrowRight: 1, PageDown: 1, ArrowLeft: -1, PageUp: -1 }[event.key];
    if (step !== undefined && links[here + step]) {
      event.preventDefault();
      links[here + step].click();
    }
    const off = `input[aria-label="${data.label}"]`;
    if (event.key === "Escape") document.querySelector(off)?.click();
  });
}
"""


def choose() -> None:
    """The switch; its state is kept over pages, and in the address."""
    toggle(
        LABEL,
        STATE,
        "For a room: no sidebar, larger type and thicker lines. The keys → and ← turn pages, "
        "Escape ends it.",
    )


def show() -> None:
    """Let the browser do what the switch says."""
    browser = st.components.v2.component("mergescope_presenting", js=SCRIPT)
    data = {"on": is_on(), "size": round(100 * FACTOR), "label": LABEL}
    browser(data=data, height=1, key="presenting_script")


def is_on() -> bool:
    """Whether this session presents (read after :func:`choose`, or as it was left)."""
    return bool(st.session_state.get(STATE, False))
