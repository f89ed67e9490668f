// The latent browser: a list that is searched, and what is known of the chosen latent.

const marks = (text) => text.replaceAll('\n', '↵').replaceAll('\t', '⇥').replaceAll('\r', '␍');

// Where only the one token is shown, a token of spaces would be nothing.
const visible = (text) => marks(text.trim() ? text : text.replaceAll(' ', '␣'));

// What a search looks through, and how much a hit there says.
function searchable(latent, texts) {
  const at = (contexts, take) => contexts.flatMap(take).map((place) => texts[place].toLowerCase());
  const contexts = [...(latent.top || []), ...(latent.rest || [])];
  return [
    ['fires on', at(contexts, (c) => [c.t[c.p]])],
    ['promotes', (latent.promotes || []).map(([place]) => texts[place].toLowerCase())],
    ['suppresses', (latent.suppresses || []).map(([place]) => texts[place].toLowerCase())],
    ['fires in', contexts.map((c) => c.t.map((place) => texts[place]).join('').toLowerCase())],
  ];
}

function match(latent, query, texts) {
  if (!query) return {score: 0, why: ''};
  const asNumber = /^#?(\d+)$/.exec(query);
  if (asNumber && latent.i === Number(asNumber[1])) return {score: 0, why: 'number'};
  if (asNumber && String(latent.i).startsWith(asNumber[1])) return {score: 1, why: 'number'};
  for (const [rank, [why, words]] of searchable(latent, texts).entries()) {
    if (words.some((word) => word.trim() === query)) return {score: 2 + rank, why};
    if (words.some((word) => word.includes(query))) return {score: 6 + rank, why};
  }
  return null;
}

const ORDERS = {
  number: ['number', (a, b) => a.i - b.i],
  max: ['strongest', (a, b) => (b.max || 0) - (a.max || 0)],
  dense: ['frequent', (a, b) => (b.density || 0) - (a.density || 0)],
  rare: ['rare', (a, b) => (a.density || 0) - (b.density || 0)],
};

function latentBrowser(content) {
  const saes = about(content.saes).filter((sae) => sae.latents && sae.latents.length);
  if (!saes.length) {
    return h('section', {id: 'latents'}, h('h2', {}, 'Latents'),
      h('p', {class: 'empty'}, 'No latents are shown: training writes its SAEs at its end, and --num-latents may be 0.'));
  }
  const state = {sae: saes[0], latent: null, found: []};
  const search = h('input', {type: 'search', id: 'search', placeholder: 'number or token', autocomplete: 'off',
    spellcheck: 'false', 'aria-label': 'Search latents by number or by token', 'aria-controls': 'latent-list'});
  const order = h('select', {'aria-label': 'Order of latents'},
    Object.entries(ORDERS).map(([key, [name]]) => h('option', {value: key}, name)));
  const choice = h('select', {'aria-label': 'SAE', class: 'sae-choice'},
    saes.map((sae, i) => h('option', {value: i}, sae.label)));
  const status = h('p', {class: 'found', role: 'status'});
  const list = h('ul', {id: 'latent-list', 'aria-label': 'Latents'});
  const detail = h('article', {id: 'latent', 'aria-label': 'The chosen latent', tabindex: -1});
  const source = h('p', {class: 'note'});

  const show = (latent, focus) => {
    state.latent = latent;
    list.querySelectorAll('button').forEach((button) => {
      const on = latent && Number(button.dataset.latent) === latent.i;
      button.setAttribute('aria-current', on ? 'true' : 'false');
      if (on) {
        // Not scrollIntoView: that would move the page as well.
        const item = button.parentElement;
        if (item.offsetTop < list.scrollTop || item.offsetTop + item.offsetHeight > list.scrollTop + list.clientHeight) {
          list.scrollTop = item.offsetTop - list.clientHeight / 3;
        }
        if (item.offsetLeft < list.scrollLeft || item.offsetLeft + item.offsetWidth > list.scrollLeft + list.clientWidth) {
          list.scrollLeft = item.offsetLeft - 12;
        }
        if (focus) button.focus({preventScroll: true});
      }
    });
    detail.replaceChildren(...(latent ? describeLatent(latent, state.sae, content, go) : []));
  };
  const choose = (latent, focus) => {
    show(latent, focus);
    // A page within another, as notebooks hold it, has no address.
    if (location.protocol !== 'about:') history.replaceState(null, '', `#${encodeURIComponent(state.sae.label)}/${latent.i}`);
  };
  const go = (number) => {
    const latent = state.sae.latents.find((one) => one.i === number);
    if (!latent) return;
    if (!state.found.includes(latent)) { search.value = ''; refresh(); }
    choose(latent);
  };
  const step = (by, focus) => {
    if (!state.found.length) return;
    const at = state.found.indexOf(state.latent);
    choose(state.found[Math.max(0, Math.min(state.found.length - 1, at + by))], focus);
  };
  const refresh = () => {
    const query = search.value.trim().toLowerCase();
    const hits = state.sae.latents.map((latent) => [latent, match(latent, query, content.texts)]).filter(([, hit]) => hit);
    const compare = ORDERS[order.value][1];
    hits.sort(([a, x], [b, y]) => x.score - y.score || compare(a, b));
    state.found = hits.map(([latent]) => latent);
    list.replaceChildren(...hits.map(([latent, hit]) => listItem(latent, hit, content, () => choose(latent))));
    const total = state.sae.latents.length;
    status.replaceChildren(query ? `${hits.length} of ${total} shown latents` : `${total} of ${count(state.sae.d_sae)} latents`,
      query && !hits.length && /^#?\d+$/.test(query) ? ': this one is not in the report, --latents adds it' : '');
    source.replaceChildren(...sourceNote(state.sae, content));
    show(state.found.includes(state.latent) && !query ? state.latent : state.found[0] || null);
  };
  const arrows = (event) => {
    const by = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (!by) return;
    event.preventDefault();
    step(by, event.currentTarget === list);
  };
  search.addEventListener('input', refresh);
  search.addEventListener('keydown', arrows);
  search.addEventListener('keydown', (event) => { if (event.key === 'Enter') detail.focus(); });
  list.addEventListener('keydown', arrows);
  order.addEventListener('change', refresh);
  choice.addEventListener('change', () => { state.sae = saes[Number(choice.value)]; state.latent = null; refresh(); });
  document.addEventListener('keydown', (event) => {
    if (event.key === '/' && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) { event.preventDefault(); search.focus(); }
  });
  const wanted = /^#(.+)\/(\d+)$/.exec(location.hash);
  if (wanted) {
    const at = saes.findIndex((sae) => encodeURIComponent(sae.label) === wanted[1]);
    if (at >= 0) {
      state.sae = saes[at];
      choice.value = at;
      state.latent = state.sae.latents.find((one) => one.i === Number(wanted[2])) || null;
    }
  }
  // At first one that has something to show.
  const most = Math.max(...state.sae.latents.map((latent) => (latent.top || []).length));
  state.latent ||= state.sae.latents.find((latent) => (latent.top || []).length === most);
  refresh();
  return h('section', {id: 'latents'}, h('h2', {}, 'Latents'), saes.length > 1 ? choice : null, source,
    h('div', {class: 'browser'}, h('div', {class: 'finder'}, h('div', {class: 'finder-row'}, search, order), status, list), detail));
}

function sourceNote(sae, content) {
  if (!content.contexts) return ['Made with --no-contexts: no texts, no logit lens. Press / to search.'];
  const {rows, tokens, dataset} = sae.about;
  return [`Texts: ${count(rows)} rows (${count(tokens)} tokens that training would use) of ${dataset}. Press / to search.`];
}

function listItem(latent, hit, content, choose) {
  const strongest = latent.top && latent.top.length ? latent.top[0] : null;
  const preview = strongest ? visible(content.texts[strongest.t[strongest.p]]) : latent.top ? 'silent here' : '';
  return h('li', {}, h('button', {type: 'button', 'data-latent': latent.i, onclick: choose},
    h('span', {class: 'item-number'}, latent.i), h('span', {class: `item-text${strongest ? '' : ' silent'}`, dir: 'auto'}, preview),
    h('span', {class: 'item-side'}, hit.why && hit.why !== 'number' ? hit.why : latent.density === undefined ? '' : percent(latent.density))));
}

function describeLatent(latent, sae, content, go) {
  const pairs = [];
  if (latent.density !== undefined) pairs.push(['In training', `fires on ${percent(latent.density)}`]);
  if (latent.top) pairs.push(['In these texts', `fires on ${percent(latent.fires / sae.about.tokens)}`], ['Strongest', number(latent.max)]);
  pairs.push(['Decoder norm', number(latent.norm)]);
  const known = new Set(sae.latents.map((one) => one.i));
  const near = latent.near.map(([other, cosine]) => h('li', {},
    known.has(other) ? h('button', {type: 'button', class: 'link', onclick: () => go(other)}, other) : h('span', {}, other),
    h('small', {}, cosine.toFixed(2))));
  return [
    h('h3', {}, 'Latent ', h('span', {class: 'latent-number'}, latent.i)),
    h('dl', {class: 'facts'}, pairs.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value)))),
    h('div', {class: 'latent-top'},
      latent.top ? h('div', {}, h('h4', {}, 'Activations'), latent.fires ? activationHistogram(latent.hist, latent.max).element
        : h('p', {class: 'empty'}, 'It does not fire in these texts.')) : null,
      h('div', {}, h('h4', {}, 'Most alike latents'), h('ul', {class: 'near'}, near))),
    latent.promotes ? lens(latent, sae, content) : sae.about.no_lens
      ? h('p', {class: 'note'}, `No logit lens: ${sae.about.no_lens}.`) : null,
    ...[['top', 'Where it fires most'], ['rest', 'Over the rest of its range']].filter(([part]) => latent[part] && latent[part].length)
      .map(([part, title]) => h('div', {}, h('h4', {}, title), h('ol', {class: 'contexts'},
        latent[part].map((context) => contextItem(context, latent.max, content.texts))))),
  ].filter(Boolean);
}

function lens(latent, sae, content) {
  const most = Math.max(...[...latent.promotes, ...latent.suppresses].map(([, logit]) => Math.abs(logit)));
  const column = (title, part, sign) => h('div', {}, h('h4', {}, title), h('ol', {class: `promoted ${sign}`}, part.map(([place, logit]) =>
    h('li', {}, h('span', {class: 'token', dir: 'auto'}, visible(content.texts[place])),
      h('span', {class: 'logit-bar'}, h('i', {style: {width: `${(100 * Math.abs(logit)) / (most || 1)}%`}})),
      h('span', {class: 'logit'}, number(logit))))));
  return h('div', {}, h('div', {class: 'lens'}, column('Promotes', latent.promotes, 'more'), column('Suppresses', latent.suppresses, 'less')),
    h('p', {class: 'note'}, `Logit lens: ${sae.about.lens} of its decoder row.`));
}

function contextItem(context, most, texts) {
  const peak = context.a[context.p];
  const tokens = context.t.map((place, i) => {
    const strength = most ? context.a[i] / most : 0;
    return h('span', {class: `tok${i === context.p ? ' peak' : ''}`, 'data-value': context.a[i],
      style: strength > 0 ? {'--strength': (0.12 + 0.88 * strength).toFixed(3)} : null}, marks(texts[place]));
  });
  const text = h('p', {dir: 'auto'}, tokens);
  const say = (event) => {
    const token = event.target.closest('.tok');
    if (!token) return tooltip.hide();
    tooltip.show(event.clientX, event.clientY, h('div', {class: 'tip-head'}, token.textContent), h('div', {}, `activation ${number(Number(token.dataset.value))}`));
  };
  text.addEventListener('pointermove', say);
  text.addEventListener('click', say);
  text.addEventListener('pointerleave', () => tooltip.hide());
  return h('li', {}, h('span', {class: 'peak-value'}, number(peak)), text);
}
