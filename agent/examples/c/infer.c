/* SPDX-License-Identifier: Apache-2.0
 *
 * cc -std=c99 -D_GNU_SOURCE -o infer infer.c
 * ./infer SOCKET MODEL INPUT DATATYPE SHAPE OUTPUT < tensor.raw      (SHAPE like 1,224,224,3; prints float32 outputs)
 */
#include "edgeopt_client.h"

static char input[64 * 1024 * 1024];
static float output[1024 * 1024];

int main(int count, char **words) {
  struct edgeopt client;
  struct edgeopt_tensor in = {0}, out = {0};
  char *at;
  int code;
  if (count != 7) {
    fprintf(stderr, "usage: %s SOCKET MODEL INPUT DATATYPE SHAPE OUTPUT < tensor.raw\n", words[0]);
    return 2;
  }
  in.name = words[3];
  in.datatype = words[4];
  for (at = strtok(words[5], ","); at != NULL && in.rank < EDGEOPT_MAX_RANK; at = strtok(NULL, ","))
    in.shape[in.rank++] = strtol(at, NULL, 10);
  in.data = input;
  in.size = fread(input, 1, sizeof input, stdin);
  out.name = words[6];
  out.data = output;
  out.size = sizeof output;
  code = edgeopt_open(&client, words[1]);
  if (code == EDGEOPT_OK) code = edgeopt_infer(&client, words[2], &in, &out);
  if (code != EDGEOPT_OK) {
    fprintf(stderr, "%s\n", client.error);
    edgeopt_close(&client);
    return code;
  }
  for (size_t i = 0; i < out.size / sizeof *output; i++) printf("%.9g\n", (double)output[i]);
  edgeopt_close(&client);
  return 0;
}
