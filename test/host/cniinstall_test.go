// Copyright (c) The azure-vnet authors. MIT licence.

package host

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"azurevnet/test"
)

// release is a directory with the archives of the CNI package, and their sums.
var release = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(test.Top, "build", "release")
	out, err := exec.Command(filepath.Join(test.Top, "scripts", "dist.sh"), append([]string{"archives", "v1.0.0", dir}, architectures...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("make dist: %w\n%s", err, out)
	}
	return dir, nil
})

// architectures are those of the archives. To compile for another one than this machine's takes a minute.
var architectures = func() []string {
	if test.Soaking {
		return []string{"amd64", "arm64"}
	}
	return []string{runtime.GOARCH}
}()

func archive() string { return "azure-vnet-cni-linux-" + runtime.GOARCH + "-v1.0.0.tgz" }

func TestDistIsReproducibleForEveryArchitecture(t *testing.T) {
	t.Parallel()
	if !test.Soaking {
		t.Skip("compiles all twice: make soak")
	}
	dir, err := release()
	if err != nil {
		t.Fatal(err)
	}
	// A checkout elsewhere, of a user with other habits.
	checkout := filepath.Join(t.TempDir(), "a checkout")
	test.MustOutput(t, "sh", "-euc", `mkdir "$2" && cd "$1" && tar --exclude=./build --exclude=./dist --exclude=./.git -cf - . | tar -xf - -C "$2"
cd "$2" && umask 077 && TZ=Asia/Tokyo LC_ALL=C.UTF-8 make dist VERSION=v1.0.0 ARCHS="$3"`, "sh", test.Top, checkout, strings.Join(architectures, " "))
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	want := rootFS{}
	for _, arch := range architectures {
		name := "azure-vnet-cni-linux-" + arch + "-v1.0.0.tgz"
		first, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		second, err := os.ReadFile(filepath.Join(checkout, "dist", name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first, second) {
			t.Errorf("%s is not the same from another checkout", name)
		}
		want["/"+name] = string(first)
		want["/SHA256SUMS"] += fmt.Sprintf("%x  %s\n", sha256.Sum256(first), name)
		checkArchive(t, name, first, machines[arch])
	}
	want["/SHA256SUMS"] = strings.Join(slices.Sorted(strings.Lines(want["/SHA256SUMS"])), "")
	got := readTree(t, filepath.Join(checkout, "dist"))
	got["/SHA256SUMS"] = strings.Join(slices.Sorted(strings.Lines(got["/SHA256SUMS"])), "")
	if !maps.Equal(got, want) {
		t.Errorf("dist/ has %v with the sums\n%swant %v with\n%s", slices.Sorted(maps.Keys(got)), got["/SHA256SUMS"], slices.Sorted(maps.Keys(want)), want["/SHA256SUMS"])
	}
}

// checkArchive says that the package lies at the top, and runs without a library.
func checkArchive(t *testing.T, name string, archive []byte, machine elf.Machine) {
	t.Helper()
	unzipped, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for all := tar.NewReader(unzipped); ; {
		f, err := all.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%v %d/%d %d %s", f.FileInfo().Mode(), f.Uid, f.Gid, f.ModTime.Unix(), f.Name))
		content, err := io.ReadAll(all)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Ext(f.Name) == ".conflist" {
			continue
		}
		program, err := elf.NewFile(bytes.NewReader(content))
		if err != nil {
			t.Fatalf("%s in %s: %v", f.Name, name, err)
		}
		if libraries, err := program.ImportedLibraries(); program.Machine != machine || program.Type != elf.ET_EXEC || len(libraries) > 0 {
			t.Errorf("%s in %s is %v for %v with libraries %v: %v", f.Name, name, program.Type, program.Machine, libraries, err)
		}
	}
	want := []string{
		"-rw-r--r-- 0/0 0 10-azure.conflist",
		"-rwxr-xr-x 0/0 0 azure-vnet",
		"-rwxr-xr-x 0/0 0 azure-vnet-ipam",
		"-rwxr-xr-x 0/0 0 azure-vnetctl",
		"-rwxr-xr-x 0/0 0 loopback",
		"-rwxr-xr-x 0/0 0 portmap",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s:\n%s", name, diff)
	}
}

func TestScriptsAreSoundForEveryShell(t *testing.T) {
	scripts, err := filepath.Glob(filepath.Join(test.Top, "scripts", "*.sh"))
	if err != nil {
		t.Fatal(err)
	}
	scripts = append(scripts, filepath.Join(test.Top, "docker-run.sh"))
	for _, check := range [][]string{{"shellcheck", "-s", "sh"}, {"dash", "-n"}, {"busybox", "sh", "-n"}, {"bash", "-n"}} {
		for _, script := range scripts {
			if out, err := exec.Command(check[0], append(check[1:], script)...).CombinedOutput(); err != nil {
				t.Errorf("%s %s: %v\n%s", strings.Join(check, " "), filepath.Base(script), err, out)
			}
		}
	}
}

// rootFS is a file system by path: a directory is "/", a link "→ target".
type rootFS map[string]string

// write makes the files in dir.
func (tr rootFS) write(t *testing.T, dir string) string {
	t.Helper()
	for path, content := range tr {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if content == "/" {
			err = os.MkdirAll(path, 0o755)
		} else {
			err = os.WriteFile(path, []byte(content), 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// readTree reads all that is below dir.
func readTree(t *testing.T, dir string) rootFS {
	t.Helper()
	tr := rootFS{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		content := []byte("/")
		if d.Type() == fs.ModeSymlink {
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			content = []byte("→ " + target)
		} else if !d.IsDir() {
			if content, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		tr[strings.TrimPrefix(path, dir)] = string(content)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// standIns are a package whose programs say which they are.
var standIns = rootFS{
	"azure-vnet": "#!/bin/sh\necho v2\n", "azure-vnet-ipam": "ipam v2", "portmap": "portmap v2", "loopback": "loopback v2",
	"10-azure.conflist": `{"name": "azure"}`,
}

// installer runs the installer on a file system that is not running.
func installer(t *testing.T, shell string, arg ...string) (string, error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: sudo make test")
	}
	words := append(strings.Fields(shell), filepath.Join(test.Top, "scripts", "install-cni-plugin.sh"))
	out, err := exec.Command(words[0], append(words[1:], arg...)...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), err
}

func TestInstallerFindsTheRuntimeAndLeavesNoTrace(t *testing.T) {
	t.Parallel()
	const containerd = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "pause"
[plugins."io.containerd.grpc.v1.cri".cni]
  # bin_dir = "/not/this"
  bin_dir = "/srv/cni/bin/"
  conf_dir = "/srv/cni/net.d"
[plugins."io.containerd.internal.v1.opt"]
  path = "/opt/containerd"
`
	const containerd2 = `version = 3
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dir = ''
  bin_dirs = [
    '/srv/two/bin',
  ]
  conf_dir = '/srv/two/net.d'
`
	k3s := "/var/lib/rancher/k3s"
	pkg := standIns.write(t, t.TempDir())
	for i, c := range []struct {
		name string
		host rootFS
		want rootFS // of what was there or comes, where it is not as expected of all
		bin  []string
		conf []string
	}{
		{"nothing is there", rootFS{"/etc": "/"}, nil, []string{"/opt/cni/bin"}, []string{"/etc/cni/net.d"}},
		{"containerd without a word of CNI", rootFS{"/etc/containerd/config.toml": "version = 2\n"}, nil, []string{"/opt/cni/bin"}, []string{"/etc/cni/net.d"}},
		{"containerd with directories of its own", rootFS{"/etc/containerd/config.toml": containerd}, nil, []string{"/srv/cni/bin"}, []string{"/srv/cni/net.d"}},
		{"containerd 2", rootFS{"/etc/containerd/config.toml": containerd2}, nil, []string{"/srv/two/bin"}, []string{"/srv/two/net.d"}},
		{"containerd with a blank in its directories", rootFS{"/etc/containerd/config.toml": strings.ReplaceAll(containerd, "/srv", "/srv/a b")}, nil, []string{"/srv/a b/cni/bin"}, []string{"/srv/a b/cni/net.d"}},
		{"CRI-O, a later file last", rootFS{
			"/etc/crio/crio.conf":               "[crio.network]\nnetwork_dir = \"/a\"\nplugin_dirs = [\n\t\"/usr/lib/cni\",\n\t\"/b\",\n]\n",
			"/etc/crio/crio.conf.d/10-net.toml": "[crio.network]\nnetwork_dir = \"/etc/crio-cni\"\n",
		}, nil, []string{"/usr/lib/cni"}, []string{"/etc/crio-cni"}},
		{"k3s before its first start", rootFS{k3s + "/agent/etc/containerd": "/", k3s + "/data/cni": "/"}, nil, []string{k3s + "/data/cni"}, []string{k3s + "/agent/etc/cni/net.d"}},
		{"an old k3s", rootFS{k3s + "/agent/etc/containerd": "/", k3s + "/data/current/bin": "/"}, nil, []string{k3s + "/data/current/bin"}, []string{k3s + "/agent/etc/cni/net.d"}},
		{"RKE2 and containerd in the same directories", rootFS{"/etc/containerd": "/", "/var/lib/rancher/rke2/agent/etc/containerd": "/"}, nil, []string{"/opt/cni/bin"}, []string{"/etc/cni/net.d"}},
		{"two runtimes", rootFS{"/etc/containerd/config.toml": containerd, "/etc/crio": "/"}, nil, []string{"/opt/cni/bin", "/srv/cni/bin"}, []string{"/etc/cni/net.d", "/srv/cni/net.d"}},
		{"plugins and a conflist of others", rootFS{
			"/opt/cni/bin/portmap": old, "/opt/cni/bin/loopback": able, "/opt/cni/bin/azure-vnet": "another's", "/etc/cni/net.d/10-azure.conflist": "another's",
		}, rootFS{
			"/opt/cni/bin/loopback": able, "/opt/cni/bin/portmap.before-azure-vnet": old,
			"/opt/cni/bin/azure-vnet.before-azure-vnet": "another's", "/etc/cni/net.d/10-azure.conflist.before-azure-vnet": "another's",
		}, []string{"/opt/cni/bin"}, []string{"/etc/cni/net.d"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !test.Soaking && i != 0 && i != 5 {
				t.Skip("some much like it run: make soak")
			}
			shell := []string{"dash", "busybox sh", "bash"}[i/3%3]
			c.host["/etc/cloud/cloud.cfg.d"] = "/"
			c.host["/etc/systemd/system"] = "/"
			root := c.host.write(t, filepath.Join(t.TempDir(), "an image"))
			before := readTree(t, root)
			for range 1 + len(c.want) { // a repeat changes nothing, and what was others' still is
				if out, err := installer(t, shell, "--root", root, pkg); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				want := maps.Clone(before)
				for _, dir := range c.bin {
					for _, name := range []string{"azure-vnet", "azure-vnet-ipam", "portmap", "loopback"} {
						want[dir+"/"+name] = standIns[name]
					}
				}
				for _, dir := range c.conf {
					want[dir+"/10-azure.conflist"] = standIns["10-azure.conflist"]
				}
				maps.Copy(want, c.want)
				got := readTree(t, root)
				service := "/etc/systemd/system/azure-vnet-reconcile.service"
				if !strings.Contains(got[service], "\nExecStart=\""+c.bin[0]+"/azure-vnet\" reconcile\n") {
					t.Errorf("the service is %q", got[service])
				}
				for _, path := range []string{
					"/etc/cloud/cloud.cfg.d/90-azure-vnet.cfg", service,
					"/etc/systemd/system/azure-vnet-reconcile.timer", "/var/lib/azure-vnet/cni.installed", "/var/lib/azure-vnet/cni.made",
				} {
					if want[path] = got[path]; got[path] == "" {
						t.Errorf("there is no %s", path)
					}
				}
				want["/etc/systemd/system/timers.target.wants/azure-vnet-reconcile.timer"] = "→ ../azure-vnet-reconcile.timer"
				for path := range maps.Clone(want) {
					for dir := filepath.Dir(path); dir != "/"; dir = filepath.Dir(dir) {
						want[dir] = "/"
					}
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Fatalf("installed:\n%s", diff)
				}
			}
			if out, err := installer(t, shell, "--uninstall", "--root", root); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if diff := cmp.Diff(before, readTree(t, root)); diff != "" {
				t.Errorf("uninstalled:\n%s", diff)
			}
		})
	}
}

func TestInstallerKeepsAnEditedConflist(t *testing.T) {
	root, pkg := t.TempDir(), standIns.write(t, t.TempDir())
	if out, err := installer(t, "sh", "--root", root, pkg); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	conflist := filepath.Join(root, "etc/cni/net.d/10-azure.conflist")
	if err := os.WriteFile(conflist, []byte("edited"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if out, err := installer(t, "sh", "--root", root, pkg); err != nil || !strings.Contains(out, "was edited") {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if text, _ := os.ReadFile(conflist); string(text) != "edited" {
		t.Errorf("the conflist is now %s", text)
	}
	if out, err := installer(t, "sh", "--uninstall", "--root", root); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if diff := cmp.Diff(rootFS{}, readTree(t, root)); diff != "" {
		t.Errorf("uninstalled:\n%s", diff)
	}
}

// TestInstallerNamesAChainedPluginThatDoesNotSpeakTheListsVersion: the list is the administrator's, and is not refused.
func TestInstallerNamesAChainedPluginThatDoesNotSpeakTheListsVersion(t *testing.T) {
	const bin = "/opt/cni/bin/"
	pkg := maps.Clone(standIns)
	pkg["portmap"] = able
	pkg["10-azure.conflist"] = `{"cniVersion": "1.0.0", "cniVersions" : ["1.0.0",
  "1.1.0"], "name": "azure", "plugins": [{"type": "azure-vnet", "ipam": {"type":"azure-vnet-ipam"}}, {"type": "portmap"}, {"type": "aged"}, {"type" : "odd"}, {"type":"nobody"}]}`
	dir := pkg.write(t, t.TempDir())
	for _, shell := range []string{"dash", "busybox sh", "bash"} {
		root := rootFS{
			bin + "aged": "#!/bin/sh\necho '{ \"cniVersion\": \"1.1.0\",\n \"supportedVersions\": [ \"0.4.0\", \"1.0.0\" ] }'\n",
			bin + "odd":  "#!/bin/sh\nexit 1\n", // such as one of another architecture
		}.write(t, t.TempDir())
		out, err := installer(t, shell, "--root", root, dir)
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		var warned []string
		for line := range strings.Lines(out) {
			if text, ok := strings.CutPrefix(strings.TrimSpace(line), "install-cni-plugin.sh: warning: "); ok {
				warned = append(warned, text)
			}
		}
		want := []string{
			"/etc/cni/net.d/10-azure.conflist asks the plugin aged for CNI 1.1.0, which /opt/cni/bin/aged does not speak: it speaks 0.4.0 1.0.0. A runtime that takes that version finds the node not ready, and does not name the plugin. Install a newer aged, or remove \"1.1.0\" from the file's cniVersions",
			"/etc/cni/net.d/10-azure.conflist names the plugin nobody, and there is no /opt/cni/bin/nobody: no container starts until it is there",
		}
		if diff := cmp.Diff(want, warned); diff != "" {
			t.Errorf("%s:\n%s\n%s", shell, diff, out)
		}
	}
}

// another's plugins: one that may stay in the place of ours, and one that may not.
const (
	able = "#!/bin/sh\necho '{\"supportedVersions\":[\"1.0.0\",\"1.1.0\"]}'\n"
	old  = "#!/bin/sh\necho '{\"supportedVersions\":[\"0.4.0\"]}'\n"
)

func TestInstallerLeavesToOthersWhatTheyPutOverItsFiles(t *testing.T) {
	const bin, conflist = "/opt/cni/bin/", "/etc/cni/net.d/10-azure.conflist"
	pkg := standIns.write(t, t.TempDir())
	over := rootFS{bin + "portmap": able, bin + "loopback": old, bin + "azure-vnet-ipam": "another's"}
	for _, c := range []struct {
		name    string
		over    rootFS
		again   bool // it is installed once more, over theirs
		between rootFS
	}{
		{"uninstalled", over, false, nil},
		{"installed again", over, true, rootFS{
			bin + "portmap": able, bin + "loopback": standIns["loopback"], bin + "azure-vnet-ipam": standIns["azure-vnet-ipam"],
			bin + "loopback.before-azure-vnet": old, bin + "azure-vnet-ipam.before-azure-vnet": "another's",
		}},
		{"all of it is another azure-vnet's", rootFS{bin + "azure-vnet": "another's", conflist: "another's"}, false, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := rootFS{bin + "loopback": "older"}.write(t, t.TempDir())
			run := func(arg ...string) {
				t.Helper()
				if out, err := installer(t, "sh", append(arg, "--root", root)...); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			run(pkg)
			c.over.write(t, root)
			if c.again {
				run(pkg)
				got := readTree(t, root)
				for path, want := range c.between {
					if got[path] != want {
						t.Errorf("installed again, %s is %q, want %q", path, got[path], want)
					}
				}
			}
			run("--uninstall")
			want := maps.Clone(c.over)
			if _, theirs := want[bin+"loopback"]; !theirs {
				want[bin+"loopback"] = "older"
			}
			got := readTree(t, root)
			maps.DeleteFunc(got, func(_, content string) bool { return content == "/" })
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("uninstalled:\n%s", diff)
			}
		})
	}
}

// TestInstallerChangesAllOrNothing makes each call of a command fail, or be
// interrupted, while one version is replaced by another and a plugin by ours.
func TestInstallerChangesAllOrNothing(t *testing.T) {
	t.Parallel()
	first, second := maps.Clone(standIns), maps.Clone(standIns)
	for name := range first {
		first[name] += "first"
	}
	image := rootFS{"/opt/cni/bin/loopback": old, "/etc/cloud/cloud.cfg.d": "/", "/etc/systemd/system": "/"}.write(t, filepath.Join(t.TempDir(), "root"))
	if out, err := installer(t, "sh", "--root", image, first.write(t, t.TempDir())); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	rootFS{"/opt/cni/bin/portmap": old, "/opt/cni/bin/azure-vnet": "another's"}.write(t, image)
	if err := os.Remove(filepath.Join(image, "etc/cloud/cloud.cfg.d/90-azure-vnet.cfg")); err != nil {
		t.Fatal(err)
	}
	before, pkg := readTree(t, image), second.write(t, t.TempDir())
	for i, c := range []struct {
		command string // of the script
		meddle  string // instead of it, or before it
		arg     []string
		stride  int // of the calls
	}{
		{"cp", "exit 1", []string{pkg}, 1},
		{"mv", "exit 1", []string{pkg}, 1},
		{"mv", "kill -INT $PPID", []string{pkg}, 4},
		{"chmod", "kill -TERM $PPID", []string{pkg}, 4},
		{"rm", "kill -INT $PPID", []string{"--uninstall"}, 4},
		{"mv", "kill -INT $PPID", []string{"--uninstall"}, 1},
	} {
		dir := rootFS{
			c.command: "#!/bin/sh\nn=$(($(cat " + "${0%/*}/calls) + 1))\necho $n >${0%/*}/calls\n[ $n != $AT ] || " + c.meddle + "\nPATH=${PATH#*:}\nexec " + c.command + " \"$@\"\n",
		}.write(t, t.TempDir())
		if i%2 == 1 && !test.Soaking {
			continue
		}
		var after rootFS
		steps := 0
		if !test.Soaking {
			c.stride += 10
		}
		for at := 0; at <= steps; at += c.stride { // at 0 nothing happens
			name := fmt.Sprintf("%s at call %d of %s, %s", c.meddle, at, c.command, c.arg[0])
			root, calls := filepath.Join(t.TempDir(), "root"), filepath.Join(dir, "calls")
			test.MustOutput(t, "cp", "-a", image, root)
			if err := os.WriteFile(calls, []byte("0"), 0o644); err != nil {
				t.Fatal(err)
			}
			shell := []string{"dash", "bash", "busybox sh"}[at%3]
			out, err := installer(t, fmt.Sprintf("env AT=%d PATH=%s:/usr/sbin:/usr/bin:/sbin:/bin %s", at, dir, shell), append(c.arg, "--root", root)...)
			got := readTree(t, root)
			if at == 0 {
				count, _ := os.ReadFile(calls)
				if steps, _ = strconv.Atoi(strings.TrimSpace(string(count))); err != nil || steps == 0 {
					t.Fatalf("%s is called %d times: %v: %s", c.command, steps, err, out)
				}
				after = got
				continue
			}
			want := after
			if err != nil {
				want = before
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s, by %s: it ends with %v, and the files are neither the old nor the new: %s\n%s", name, shell, err, diff, out)
			}
		}
	}
}

func TestInstallerFailsBeforeItChangesAnything(t *testing.T) {
	good := standIns.write(t, t.TempDir())
	half := rootFS{"azure-vnet": "x"}.write(t, t.TempDir())
	released := rootFS{"azure-vnet-cni-linux-amd64-v9.tgz": "not what was released"}.write(t, t.TempDir())
	damaged := filepath.Join(released, "azure-vnet-cni-linux-amd64-v9.tgz")
	sums := strings.Repeat("0", 64) + "  azure-vnet-cni-linux-amd64-v9.tgz\n"
	withSums := rootFS{"a.tgz": "", "azure-vnet-cni-linux-amd64-v9.tgz": "damaged", "SHA256SUMS": sums}.write(t, t.TempDir())
	for _, c := range []struct {
		name string
		host rootFS
		what string
		want string
	}{
		{"the directory is not the package", nil, half, "not the CNI package"},
		{"no such archive", nil, "/nowhere/a.tgz", "no file /nowhere/a.tgz"},
		{"an archive without SHA256SUMS", nil, damaged, "SHA256SUMS"},
		{"a damaged archive", nil, filepath.Join(withSums, filepath.Base(damaged)), "the checksum of azure-vnet-cni-linux-amd64-v9.tgz"},
		{"an archive that SHA256SUMS does not name", nil, filepath.Join(withSums, "a.tgz"), "no line for a.tgz"},
		{"a place that cannot be made", rootFS{"/opt/cni": "a file"}, good, "/opt/cni cannot be made; nothing was changed"},
		{"a place that cannot be written", rootFS{"/opt/cni/bin/portmap.azure-vnet-new": "/"}, good, "portmap cannot be written"},
		{"another network comes first", rootFS{"/etc/cni/net.d/05-other.conf": "{}"}, good, "05-other.conf comes before"},
		{"AKS by its labels", rootFS{"/etc/default/kubelet": "KUBELET_NODE_LABELS=agentpool=a,kubernetes.azure.com/mode=system\n"}, good, "node of AKS"},
		{"AKS by its resource group", rootFS{"/etc/kubernetes/azure.json": `{"resourceGroup": "MC_g_c_westus"}`}, good, "node of AKS"},
		{"AKS by its name", rootFS{"/etc/hostname": "aks-nodepool1-12345678-vmss00000a\n"}, good, "node of AKS"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := c.host.write(t, t.TempDir())
			before := readTree(t, root)
			out, err := installer(t, "sh", "--root", root, c.what)
			if err == nil || !strings.Contains(out, c.want) {
				t.Errorf("want an error that says %q: %v: %s", c.want, err, out)
			}
			if diff := cmp.Diff(before, readTree(t, root)); diff != "" {
				t.Errorf("it changed something:\n%s", diff)
			}
		})
	}
	t.Run("a node of a cluster of one's own is none of AKS'", func(t *testing.T) {
		root := rootFS{
			"/etc/default/kubelet":       "KUBELET_NODE_LABELS=kubernetes.azure.com/role=agent,agentpool=agent2,kubernetes.azure.com/cluster=group\n",
			"/etc/kubernetes/azure.json": `{"resourceGroup": "group"}`, "/etc/hostname": "k8s-agent2-12345678-0\n", "/opt/azure/containers/x": "",
		}.write(t, t.TempDir())
		if out, err := installer(t, "sh", "--root", root, good); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// runInstaller runs the installer in the VM, copied alone, with success.
func runInstaller(h test.Host, env []string, arg ...string) string {
	h.T.Helper()
	got, said := runScript(h, env, "scripts/install-cni-plugin.sh", arg...)
	if got.Status != 0 {
		h.T.Fatalf("install-cni-plugin.sh %s: %+v\n%s", strings.Join(arg, " "), got, said)
	}
	return got.Out
}

// ownOpt gives the VM directories of its own for what the installer and the
// plugins write outside of /etc and /var/lib, and hides a runtime of this
// machine, which may have other directories.
func ownOpt(h test.Host) {
	h.T.Helper()
	h.Must("sh", "-c", "mkdir -p /opt && mount -t tmpfs tmpfs /opt && mount -t tmpfs tmpfs /var/log && rm -rf /etc/containerd /etc/crio /etc/cni")
}

// serveReleases serves the archives in the VM as a site of releases does, and
// returns where.
func serveReleases(h test.Host) string {
	h.T.Helper()
	dir, err := release()
	if err != nil {
		h.T.Fatal(err)
	}
	const at = "127.0.0.1:8099"
	h.Must("sh", "-c", "mkdir -p /run/site/latest /run/site/download/v1.0.0 && cp "+dir+"/* /run/site/download/v1.0.0/ &&"+
		"ln -s ../download/v1.0.0 /run/site/latest/download && busybox httpd -p "+at+" -h /run/site")
	return "http://" + at
}
