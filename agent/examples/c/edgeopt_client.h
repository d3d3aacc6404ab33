/* SPDX-License-Identifier: Apache-2.0
 *
 * Ask a running edgeopt-agent from C: one tensor in, one tensor out, over its Unix socket. Header only, C99 and POSIX.
 *
 *     struct edgeopt client;
 *     if (edgeopt_open(&client, "/var/lib/edgeopt/agent.sock")) ...
 *     struct edgeopt_tensor in = {"image", "UINT8", {1, 224, 224, 3}, 4, pixels, sizeof pixels};
 *     float scores[1000];
 *     struct edgeopt_tensor out = {"scores", "FP32", {0}, 0, scores, sizeof scores};
 *     if (edgeopt_infer(&client, "efficientnet-lite0", &in, &out)) fprintf(stderr, "%s\n", client.error);
 *     edgeopt_close(&client);
 *
 * Every function returns 0, or a code: EDGEOPT_AWAY (nobody answers; open again), EDGEOPT_BUSY (no room now; try again
 * later), EDGEOPT_REFUSED (the request does not fit the model), EDGEOPT_FAILED (the device failed). `error` says why, in
 * the agent's own words. A client belongs to one thread. Names must hold no quotes and no backslashes.
 *
 * Protocol: Open Inference Protocol v2 with the binary tensor extension; little-endian machines.
 */
#ifndef EDGEOPT_CLIENT_H
#define EDGEOPT_CLIENT_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define EDGEOPT_MAX_RANK 8
#define EDGEOPT_HEAD_BYTES 16384
#define EDGEOPT_TIMEOUT_S 30

enum { EDGEOPT_OK = 0, EDGEOPT_AWAY = 1, EDGEOPT_BUSY = 2, EDGEOPT_REFUSED = 3, EDGEOPT_FAILED = 4 };

struct edgeopt {
  int socket;
  char error[512];
};

/* `datatype` is the protocol's: FP32, UINT8, INT8, INT64, ... Of an output only `name`, `data` and `size` are read; `size`
 * is the room there, and after a call what was filled. */
struct edgeopt_tensor {
  const char *name;
  const char *datatype;
  long shape[EDGEOPT_MAX_RANK];
  int rank;
  void *data;
  size_t size;
};

static int edgeopt_say(struct edgeopt *client, int code, const char *text) {
  snprintf(client->error, sizeof client->error, "%s", text);
  return code;
}

static int edgeopt_open(struct edgeopt *client, const char *path) {
  struct sockaddr_un address;
  struct timeval limit = {EDGEOPT_TIMEOUT_S, 0};
  memset(&address, 0, sizeof address);
  address.sun_family = AF_UNIX;
  client->error[0] = 0;
  client->socket = -1;
  if (strlen(path) >= sizeof address.sun_path) return edgeopt_say(client, EDGEOPT_REFUSED, "the socket's path is too long");
  strcpy(address.sun_path, path);
  client->socket = socket(AF_UNIX, SOCK_STREAM, 0);
  if (client->socket < 0) return edgeopt_say(client, EDGEOPT_AWAY, strerror(errno));
  setsockopt(client->socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(client->socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  if (connect(client->socket, (struct sockaddr *)&address, sizeof address)) {
    edgeopt_say(client, EDGEOPT_AWAY, strerror(errno));
    close(client->socket);
    client->socket = -1;
    return EDGEOPT_AWAY;
  }
  return EDGEOPT_OK;
}

static void edgeopt_close(struct edgeopt *client) {
  if (client->socket >= 0) close(client->socket);
  client->socket = -1;
}

static int edgeopt_send(struct edgeopt *client, const void *bytes, size_t size) {
  const char *at = bytes;
  while (size) {
    ssize_t sent = send(client->socket, at, size, MSG_NOSIGNAL);
    if (sent <= 0) return edgeopt_say(client, EDGEOPT_AWAY, strerror(errno));
    at += sent;
    size -= (size_t)sent;
  }
  return EDGEOPT_OK;
}

static int edgeopt_receive(struct edgeopt *client, void *bytes, size_t size) {
  char *at = bytes;
  while (size) {
    ssize_t got = recv(client->socket, at, size, 0);
    if (got <= 0) return edgeopt_say(client, EDGEOPT_AWAY, got ? strerror(errno) : "the agent closed the connection");
    at += got;
    size -= (size_t)got;
  }
  return EDGEOPT_OK;
}

/* A header's number in an answer's head, or `missing`. */
static size_t edgeopt_header(const char *head, const char *name, size_t missing) {
  const char *at = head;
  size_t length = strlen(name);
  while ((at = strstr(at, "\r\n")) != NULL) {
    at += 2;
    if (strncmp(at, name, length) == 0 && at[length] == ':') return (size_t)strtoull(at + length + 1, NULL, 10);
  }
  return missing;
}

static int edgeopt_answer(struct edgeopt *client, struct edgeopt_tensor *out) {
  char head[EDGEOPT_HEAD_BYTES];
  size_t at = 0, length, split;
  int status, code;
  /* byte by byte up to the empty line: nothing of the body is taken, and no buffer is kept */
  while (at < 4 || memcmp(head + at - 4, "\r\n\r\n", 4) != 0) {
    if (at + 1 >= sizeof head) return edgeopt_say(client, EDGEOPT_AWAY, "the answer's head is too long");
    if ((code = edgeopt_receive(client, head + at++, 1)) != EDGEOPT_OK) return code;
  }
  head[at] = 0;
  if (sscanf(head, "HTTP/1.1 %d", &status) != 1) return edgeopt_say(client, EDGEOPT_AWAY, "no HTTP/1.1 answer");
  length = edgeopt_header(head, "Content-Length", 0);
  split = edgeopt_header(head, "Inference-Header-Content-Length", length);
  if (split > length) return edgeopt_say(client, EDGEOPT_AWAY, "the answer's lengths do not fit");
  char *text = malloc(split + 1);
  if (text == NULL) return edgeopt_say(client, EDGEOPT_FAILED, "no memory");
  code = edgeopt_receive(client, text, split);
  text[code == EDGEOPT_OK ? split : 0] = 0;
  if (code == EDGEOPT_OK && status != 200) {
    code = status == 503 ? EDGEOPT_BUSY : status >= 500 ? EDGEOPT_FAILED : EDGEOPT_REFUSED;
    edgeopt_say(client, code, text);
    if (strstr(head, "Connection: close") != NULL) edgeopt_close(client);
  }
  free(text);
  if (code != EDGEOPT_OK) return code;
  if (length - split > out->size) {
    edgeopt_close(client);
    return edgeopt_say(client, EDGEOPT_REFUSED, "the output is larger than the room for it; the connection is closed");
  }
  out->size = length - split;
  return edgeopt_receive(client, out->data, out->size);
}

static int edgeopt_infer(
    struct edgeopt *client, const char *model, const struct edgeopt_tensor *in, struct edgeopt_tensor *out) {
  char shape[256] = "", json[2048], head[512];
  int at = 0, axis, length, size, code;
  if (client->socket < 0) return edgeopt_say(client, EDGEOPT_AWAY, "not connected; open again");
  if (in->rank < 0 || in->rank > EDGEOPT_MAX_RANK) return edgeopt_say(client, EDGEOPT_REFUSED, "too many axes");
  for (axis = 0; axis < in->rank; axis++)
    at += snprintf(shape + at, sizeof shape - (size_t)at, "%s%ld", axis ? "," : "", in->shape[axis]);
  length = snprintf(
      json, sizeof json,
      "{\"inputs\":[{\"name\":\"%s\",\"datatype\":\"%s\",\"shape\":[%s],\"parameters\":{\"binary_data_size\":%zu}}],"
      "\"outputs\":[{\"name\":\"%s\",\"parameters\":{\"binary_data\":true}}]}",
      in->name, in->datatype, shape, in->size, out->name);
  size = snprintf(
      head, sizeof head,
      "POST /v2/models/%s/infer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
      "Content-Length: %zu\r\nInference-Header-Content-Length: %d\r\n\r\n",
      model, (size_t)length + in->size, length);
  if (length < 0 || length >= (int)sizeof json || size < 0 || size >= (int)sizeof head)
    return edgeopt_say(client, EDGEOPT_REFUSED, "the names are too long");
  if ((code = edgeopt_send(client, head, (size_t)size)) != EDGEOPT_OK) return code;
  if ((code = edgeopt_send(client, json, (size_t)length)) != EDGEOPT_OK) return code;
  if ((code = edgeopt_send(client, in->data, in->size)) != EDGEOPT_OK) return code;
  return edgeopt_answer(client, out);
}

#endif
