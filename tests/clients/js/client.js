// grpc-js side of the end-to-end tests, with raw serialisers.
//
// node client.js ADDR manifest FILE      the manifest's bytes to FILE
// node client.js ADDR send FILE          sends FILE's messages (a line each: NAME, a blank, base64) and half-closes
// node client.js ADDR health             Check of "", "cvms_test_server" and "agent"
// TLS: CA, CERT, KEY (files) and SERVER_NAME in the environment
'use strict';
const fs = require('fs');
const grpc = require('@grpc/grpc-js');

const CHUNK = 1 << 20;
const raw = (b) => b;
const bidi = { path: '/cvms.Service/Process', requestStream: true, responseStream: true,
  requestSerialize: raw, requestDeserialize: raw, responseSerialize: raw, responseDeserialize: raw };
const unary = { ...bidi, path: '/grpc.health.v1.Health/Check', requestStream: false, responseStream: false };
const Client = grpc.makeGenericClientConstructor({ process: bidi, check: unary }, 'cvms');

function connect(addr) {
  const e = process.env, read = (f) => (f ? fs.readFileSync(f) : null);
  const options = { 'grpc.max_receive_message_length': 8 << 20, 'grpc.enable_http_proxy': 0 };
  if (e.SERVER_NAME) options['grpc.ssl_target_name_override'] = e.SERVER_NAME;
  const creds = e.CA ? grpc.credentials.createSsl(read(e.CA), read(e.KEY), read(e.CERT)) : grpc.credentials.createInsecure();
  return new Client(addr, creds, options);
}

function fail(why) {
  console.error('client.js: ' + why);
  process.exit(1);
}

function varint(b, i) {
  let v = 0, shift = 1;
  for (;; i++, shift *= 128) {
    v += (b[i] & 127) * shift;
    if (b[i] < 128) return [v, i + 1];
  }
}

// Calls f(number, value) for each field; value is a number or a Buffer.
function fields(b, f) {
  for (let i = 0, tag, v; i < b.length;) {
    [tag, i] = varint(b, i);
    [v, i] = varint(b, i);
    if (tag % 8 === 2) {
      if (i + v > b.length) fail('truncated message');
      f(tag >> 3, b.subarray(i, i + v));
      i += v;
    } else if (tag % 8 === 0) f(tag >> 3, v);
    else fail('wire type ' + (tag % 8));
  }
}

// Reads a manifest; done(bytes) is called at its end, and the stream is left open.
function receive(stream, done) {
  const parts = [];
  let last = false, short = false;
  stream.on('data', (message) => {
    if (last) fail('a message after the manifest');
    let data = Buffer.alloc(0), id = '', kinds = 0;
    fields(message, (n, chunk) => {
      if (n !== 1) fail('server message of kind ' + n);
      kinds++;
      fields(chunk, (k, v) => {
        if (k === 1) data = v;
        else if (k === 2) id = v.toString();
        else if (k === 3) last = v === 1;
      });
    });
    if (kinds !== 1 || id !== '1') fail(`${kinds} chunks in a message, id ${id}`);
    if (last ? data.length : (data.length === 0 || data.length > CHUNK || short)) fail(`chunk of ${data.length} bytes`);
    short = data.length < CHUNK;
    parts.push(data);
    if (last) done(Buffer.concat(parts));
  });
  stream.on('error', (e) => fail(e.message));
}

function finish(stream, client) {
  stream.on('status', (s) => {
    if (s.code !== grpc.status.OK) fail(`status ${s.code} ${s.details}`);
    client.close();
  });
  stream.end();
}

function check(client, names) {
  if (names.length === 0) return client.close();
  const [[name, code]] = names, request = Buffer.concat([Buffer.from([10, name.length]), Buffer.from(name)]);
  client.check(request, (e, reply) => {
    if ((e ? e.code : 0) !== code) fail(`Check "${name}": ${e}`);
    if (!e && reply.toString('hex') !== '0801') fail(`Check "${name}": ${reply.toString('hex')}`);
    check(client, names.slice(1));
  });
}

const [addr, mode, file] = process.argv.slice(2);
const client = connect(addr);
setTimeout(() => fail('no end after 60 s'), 60000).unref();
if (mode === 'health') {
  check(client, [['', 0], ['cvms_test_server', 0], ['agent', grpc.status.NOT_FOUND]]);
} else {
  const metadata = new grpc.Metadata();
  metadata.set('job-id', 'cvm-18');
  metadata.set('trace-bin', Buffer.from([0, 255]));
  const stream = client.process(metadata);
  receive(stream, (bytes) => {
    if (mode === 'manifest') fs.writeFileSync(file, bytes);
    else
      for (const line of fs.readFileSync(file, 'utf8').replace(/\n$/, '').split('\n'))
        stream.write(Buffer.from(line.split(' ')[1], 'base64'));
    finish(stream, client);
  });
}
