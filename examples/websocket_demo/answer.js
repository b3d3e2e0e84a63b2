// A greedy continuation, token after token.

/** Yields text as it becomes certain. bundle: of bundle.js; connection: of stip.js. */
export async function* answer(bundle, connection, prompt, most = 48, token = null) {
  const { manifest, tokenizer } = bundle;
  const { header: opened } = await connection.ask({
    type: "open", model: manifest.served_name, key_id: manifest.key_id, dtype: "float32", token,
  });
  if (opened.hidden_size !== manifest.hidden_size || opened.vocab_size !== manifest.vocab_size)
    throw new Error("the cloud serves another model than this bundle's");
  const utf8 = new TextDecoder(); // a token may end inside a character
  let ids = [...manifest.prefix_ids, ...tokenizer.encode(prompt)];
  let keep = 0;
  for (let seq = 0; seq < most && keep + ids.length <= opened.context; seq++) {
    const embeddings = [await bundle.hidden(ids), [ids.length, manifest.hidden_size]];
    const reply = await connection.ask({ type: "append", seq, keep, rows: 1, top_k: 1 }, embeddings);
    keep += ids.length;
    // A cloud need not be honest: section 6 of PROTOCOL.md lists all that a client should check.
    if (reply.header.seq !== seq || reply.header.kv_length !== keep)
      throw new Error("the cloud's answer cannot be true");
    const [, best] = reply.tensors; // values, ids, log_sum_exp
    ids = [bundle.plain(best[0])];
    if (manifest.end_ids.includes(ids[0])) return;
    yield utf8.decode(tokenizer.bytes(ids[0]), { stream: true });
  }
}
