// Copyright (c) The azure-vnet authors. MIT licence.

package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Blocks are the shell blocks of a document by how they are proved: the remark
// before each says it.
func Blocks(t *testing.T, doc string) map[string][]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(Top, doc))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string][]string{}
	marked := regexp.MustCompile("(?s)<!-- (run|read): ([^>]*) -->\n```sh\n(.*?)```")
	for _, m := range marked.FindAllStringSubmatch(string(text), -1) {
		found[m[1]+": "+m[2]] = append(found[m[1]+": "+m[2]], m[3])
	}
	if all := strings.Count(string(text), "```sh\n"); all != len(marked.FindAllString(string(text), -1)) {
		t.Errorf("%s: a shell block has no remark that says how it is proved", doc)
	}
	return found
}

// AsUser gives a command what the README takes for granted: sudo, and the
// project at its public address.
func AsUser(t *testing.T, env []string) []string {
	t.Helper()
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "sudo"), []byte("#!/bin/sh\nexec env \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return append(env, "PATH="+bin+":"+os.Getenv("PATH"), "GIT_CONFIG_COUNT=1",
		"GIT_CONFIG_KEY_0=url."+Top+".insteadOf", "GIT_CONFIG_VALUE_0=https://github.com/azure-vnet/azure-vnet")
}

// MustOutput is what a command prints that succeeds.
func MustOutput(t *testing.T, name string, arg ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, arg...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}
