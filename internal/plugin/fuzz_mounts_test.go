// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import (
	"path/filepath"
	"strings"
	"testing"
)

// FuzzMounts reads any mountinfo. A mount is read as the kernel wrote it, whatever its name. A directory's place is
// found again by the mounts that the place was read from.
func FuzzMounts(f *testing.F) {
	for _, mountinfo := range []string{
		"", "\n\n", "1 2 3 4",
		"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n25 22 0:23 / /run rw,nosuid shared:5 - tmpfs tmpfs rw\n560 25 0:4 net:[4026532264] /run/docker/netns/1a2b rw shared:4 - nsfs nsfs rw\n",
		"40 39 0:50 / / rw - overlay overlay rw\n" + `41 40 8:1 /srv/my\040files/plugins/` + strings.Repeat("a", 64) + `/propagated-mount /data rw shared:3 - ext4 /dev/sda1 rw` + "\n",
		"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 8:3 / /data rw - ext4 /dev/sdc1 rw\n3 2 8:1 /data /data/again rw - ext4 /dev/sda1 rw\n",
		"1 0 8:1 /x//deleted / rw - ext4 x rw\n",
	} {
		f.Add(mountinfo, "/data", "")
	}
	f.Add("1 0 8:1 / / rw - ext4 x rw\n", "/data/a/../..", "a b\t\n\\040")
	f.Add("", "a\u00a0b", "\r\v\x85") // blanks that the kernel does not escape
	escape := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`)
	f.Fuzz(func(t *testing.T, mountinfo, dir, root string) {
		one := mount{"8:1", "/" + root, "/" + dir}
		line := "7 1 8:1 " + escape.Replace(one.root) + " " + escape.Replace(one.point) + " rw - ext4 x rw\n"
		if got := parseMounts(line); len(got) != 1 || got[0] != one {
			t.Errorf("%q is read as %+v", line, got)
		}
		mounts := parseMounts(mountinfo)
		usual := true // each path is one that a directory has
		for _, m := range mounts {
			for _, path := range []string{m.root, m.point} {
				usual = usual && filepath.IsAbs(path) && filepath.Clean(path) == path
			}
		}
		if id := pluginID(mounts, dir); id != "" && len(id) != 64 {
			t.Errorf("plugin %q", id)
		}
		if dir = filepath.Clean(dir); !filepath.IsAbs(dir) {
			return
		}
		p := placeOf(mounts, dir)
		found := p.findPath(mounts)
		if found != "" && placeOf(mounts, found) != p {
			t.Errorf("%s is %+v, which is found as %s, which is %+v", dir, p, found, placeOf(mounts, found))
		}
		if p != (place{}) && found == "" && usual {
			t.Errorf("%s is %+v, and is not found by the same mounts", dir, p)
		}
	})
}
