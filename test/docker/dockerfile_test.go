// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// offlineBase makes a Debian with Go and make in $1 from $2, its modules and
// packages in files: a build in a simulated VM reaches no mirror.
const offlineBase = `root=$1 top=$2
debootstrap --variant=minbase --include=make bookworm "$root" "${FRESH_MIRROR:-http://deb.debian.org/debian}" >"$root.log" 2>&1 || { tail "$root.log"; exit 1; }
cp -a "$(go env GOROOT)" "$root/usr/local/go"
(cd "$top" && GOFLAGS=-mod=mod GOMODCACHE="$root/mod" go mod download && find "$root/mod" -mindepth 1 -maxdepth 1 ! -name cache -exec sh -c 'chmod -R u+w "$1" && rm -rf "$1"' sh {} \;)
cp -a "$top/build/packages/deb" "$root/debs"
cd "$root/debs"
for deb in *.deb; do
	dpkg-deb -f "$deb"
	echo "Filename: ./$deb"
	echo "Size: $(stat -c %s "$deb")"
	echo "SHA256: $(sha256sum "$deb" | cut -d' ' -f1)"
	echo
done >Packages
rm -rf "$root"/etc/apt/sources.list.d/* "$root"/var/cache/apt/archives/*.deb
echo 'deb [trusted=yes] file:/debs ./' >"$root/etc/apt/sources.list"`

// TestDockerfile: it makes the same root file system as make rootfs.
func TestDockerfile(t *testing.T) {
	if !test.Soaking {
		t.Skip("takes long: make soak")
	}
	if _, err := test.BuildPlugin(); err != nil {
		t.Fatal(err)
	}
	_, vms := test.NewVNet(t, vnetsim.VMConfig{})
	h := vms[0]
	h.WithEngine()
	work := t.TempDir()
	test.MustOutput(t, "sh", "-euc", offlineBase, "sh", work+"/base", test.Top)
	script := fmt.Sprintf(`tar -C %[1]s/base -c . | docker import --change 'ENV PATH=/usr/local/go/bin:/usr/sbin:/usr/bin:/sbin:/bin' - base
docker build -q --network none --build-arg BASE=base --build-arg GOPROXY=file:///mod/cache/download --build-arg VERSION=%[2]s -t azure-vnet-rootfs .
mkdir %[1]s/rootfs
docker export "$(docker create azure-vnet-rootfs x)" | tar -x -C %[1]s/rootfs`, work, test.MustOutput(t, test.PluginBinary, "version"))
	t.Log(shell(h, test.Top, script))
	got := tree(t, work+"/rootfs")
	for _, engines := range []string{".dockerenv", "dev/console", "dev/pts", "dev/shm", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf"} {
		delete(got, engines)
	}
	if diff := cmp.Diff(tree(t, filepath.Join(test.Top, "build", "plugin", "rootfs")), got); diff != "" {
		t.Errorf("the Dockerfile makes another root file system (- make, + docker build):\n%s", diff)
	}
}

// tree is what a directory holds: modes, links and contents.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		what := info.Mode().String()
		switch info.Mode().Type() {
		case fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " to " + to
		case 0:
			body, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += fmt.Sprintf(" %x", sha256.Sum256(body))
		}
		if name, _ := filepath.Rel(dir, path); name != "." {
			all[name] = what
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
