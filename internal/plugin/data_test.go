// Copyright (c) The azure-vnet authors. MIT licence.

package plugin

import "testing"

// A plugin records where networks.json lies. A process with other mounts finds the file by this record.
func TestAPlaceIsFoundThroughOtherMounts(t *testing.T) {
	const plugin = "40 39 0:50 / / rw - overlay overlay rw\n" +
		`41 40 8:1 /srv/my\040files/plugins/a/propagated-mount /data rw shared:3 - ext4 /dev/sda1 rw` + "\n"
	left := placeOf(parseMounts(plugin), "/data")
	expect(t, "left", place{"8:1", "/srv/my files/plugins/a/propagated-mount"}, left)
	const root = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
	for _, c := range []struct{ name, mountinfo, want string }{
		{"the whole file system", root, "/srv/my files/plugins/a/propagated-mount"},
		{"the file system on a mount point", "1 0 8:2 / / rw - ext4 /dev/sdb1 rw\n2 1 8:1 / /mnt rw - ext4 /dev/sda1 rw\n", "/mnt/srv/my files/plugins/a/propagated-mount"},
		{"a part of it", `2 1 8:1 /srv/my\040files /var/lib/docker rw - ext4 /dev/sda1 rw` + "\n", "/var/lib/docker/plugins/a/propagated-mount"},
		{"the directory alone", `2 1 8:1 /srv/my\040files/plugins/a/propagated-mount /x rw - ext4 /dev/sda1 rw` + "\n", "/x"},
		{"hidden, and seen elsewhere", root + "2 1 8:3 / /srv rw - ext4 /dev/sdc1 rw\n3 1 8:1 / /again rw - ext4 /dev/sda1 rw\n", "/again/srv/my files/plugins/a/propagated-mount"},
		{"hidden", root + "2 1 8:3 / /srv rw - ext4 /dev/sdc1 rw\n", ""},
		{"another part", "2 1 8:1 /srv/my /var/lib/docker rw - ext4 /dev/sda1 rw\n", ""},
		{"another device", "1 0 8:2 / / rw - ext4 /dev/sdb1 rw\n", ""},
		{"nothing", "", ""},
	} {
		if got := left.findPath(parseMounts(c.mountinfo)); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
