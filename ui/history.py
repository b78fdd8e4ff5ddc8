"""The browser's history: one entry a page, which always says the page's present address.

Streamlit adds an entry whenever the server changes the address, and may do so before it has left
the page that was in view. So every address that the server sends says which page it is of, and
the browser gives that page's entry the address, once it is in view.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

PAGE = "_page"  # the parameter that says it; it never shows
SCRIPT = """
export default function ({ data }) {
  const { parameter, pages } = data;
  const history = window.history;
  const pageOf = (path) => {
    const last = path.split("/").filter(Boolean).pop();
    return pages.includes(last) ? last : pages[0];
  };
  const split = (url) => {
    const target = new URL(url ?? window.location.href, window.location.href);
    const page = target.searchParams.get(parameter);
    if (page !== null) {
      const parts = target.search.slice(1).split("&");
      target.search = parts.filter((part) => !part.startsWith(parameter + "=")).join("&");
    }
    return [target, page];
  };
  if (window.mergescopeHistory) return;
  window.mergescopeHistory = true;
  const push = history.pushState.bind(history);
  const replace = history.replaceState.bind(history);
  let early = null;
  const go = (add) => (state, title, url) => {
    const [target, page] = split(url);
    const here = pageOf(window.location.pathname);
    if (page !== null && page !== pageOf(target.pathname)) {
      early = [page, target.search];
      return;
    }
    if (early !== null && early[0] === pageOf(target.pathname)) {
      if (page === null) target.search = early[1];
      early = null;
    }
    const anew = add && pageOf(target.pathname) !== here;
    (anew ? push : replace)(state, title, target);
  };
  history.pushState = go(true);
  history.replaceState = go(false);
  history.replaceState(history.state, "", window.location.href);
}
"""


def keep_one_entry_a_page(pages: Sequence[str]) -> None:
    """Let an address that changes within a page take the place of the one before.

    Args:
        pages: the last part of each page's path; the first is shown where the path names none.
    """
    browser = st.components.v2.component("mergescope_history", js=SCRIPT)
    browser(data={"parameter": PAGE, "pages": list(pages)}, height=1)
