// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"time"

	"azurevnet/internal/statefile"
	"azurevnet/test/random"
)

// The steps of a history that are no calls of the pool: what Azure, people and the host do.

// changeList changes Azure's list. It may have addresses that Azure keeps for itself.
func (h *history) changeList() {
	h.lists = nil
	for range h.number(9) {
		if a := modelAddr(random.Evenly(5, 6, 7, 8, 9, 10, 11, 12, 1, 2, 3, 255).Draw(h.t, "listed")); !slices.Contains(h.lists, a) {
			h.lists = append(h.lists, a)
		}
	}
}

// foreign starts a container of another plugin, which takes an address that no container has.
func (h *history) foreign() {
	if a := h.address(); !h.isRouted(a) {
		h.others[a] = 17
	}
}

// editLease deletes a lease from the file, or changes its time, as a person may.
func (h *history) editLease() {
	var all []string
	for a := range h.leases {
		all = append(all, a.String())
	}
	if len(all) == 0 {
		return
	}
	slices.Sort(all)
	a := addr(random.Evenly(all...).Draw(h.t, "edited"))
	by := random.Evenly(0, -time.Hour, 10*time.Minute).Draw(h.t, "by")
	err := statefile.Update(h.ctx, h.path, "vi", func(s *state) error {
		if r := s.Leases[a]; by != 0 {
			r.Since += by
			s.Leases[a] = r
		} else {
			delete(s.Leases, a)
		}
		return nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
	l := h.leases[a]
	l.Since += by
	h.leases[a] = l
	if by == 0 {
		delete(h.leases, a)
		delete(h.proved, a)
	}
}

// damageFile replaces the file by one that nobody can read, or removes it.
func (h *history) damageFile() {
	body, err := os.ReadFile(h.path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.t.Fatal(err)
	}
	how := random.Evenly("remove", "half", "empty", "zeros", "garbage", "version", "absurd").Draw(h.t, "damage")
	if how == "remove" {
		_ = os.Remove(h.path) // there may be none
	} else {
		h.edited = map[string][]byte{
			"half": body[:len(body)/2], "empty": {}, "zeros": make([]byte, 4096), "garbage": []byte("{"), "version": []byte(`{"version":2042}`),
			"absurd": []byte(absurdFile(`"fd00::5":{"owner":"o","mac":"m","prefix":"fd00::/64","since":1}`, "", "")),
		}[how]
		h.write(h.path, h.edited)
	}
	time.Sleep(time.Millisecond) // a file that is set aside is named by the time
	h.loseFile()
}

// killWriter leaves what a writer leaves that is killed before its rename.
func (h *history) killWriter() {
	body, _ := os.ReadFile(h.path)
	h.write(h.path+".tmp", body[:len(body)*h.number(11)/10])
}

// write writes a file, in a directory that may be gone.
func (h *history) write(path string, body []byte) {
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, body, 0o600)); err != nil {
		h.t.Fatal(err)
	}
}

// bootVM boots the VM. Its /run is gone, or lies on a disk. Then the file is of another boot: of it only the addresses
// are kept that the source told.
func (h *history) bootVM() {
	knows, known := h.knows, h.known
	if _, err := os.Stat(h.path); err == nil && random.Evenly("gone", "on a disk").Draw(h.t, "run") == "on a disk" {
		if err := statefile.Update(h.ctx, h.path, "boot", func(s *state) error { s.Boot = "another"; return nil }); err != nil {
			h.t.Fatal(err)
		}
	} else {
		knows, known = false, nil
		if err := os.RemoveAll(filepath.Dir(h.path)); err != nil {
			h.t.Fatal(err)
		}
	}
	h.reboot()
	h.knows, h.known = knows, known
}
