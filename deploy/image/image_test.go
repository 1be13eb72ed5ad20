package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// program writes a static ELF header for a machine and then size bytes that do
// not compress, and returns the path.
func program(t *testing.T, machine uint16, size int, dynamic bool) string {
	t.Helper()
	b := make([]byte, 64, 64+56+size) // Elf64_Ehdr
	copy(b, "\x7fELF\x02\x01\x01")
	binary.LittleEndian.PutUint16(b[16:], 2) // ET_EXEC
	binary.LittleEndian.PutUint16(b[18:], machine)
	binary.LittleEndian.PutUint32(b[20:], 1)
	binary.LittleEndian.PutUint16(b[52:], 64)
	binary.LittleEndian.PutUint16(b[54:], 56)
	if dynamic {
		binary.LittleEndian.PutUint64(b[32:], 64)
		binary.LittleEndian.PutUint16(b[56:], 1)
		ph := make([]byte, 56)
		binary.LittleEndian.PutUint32(ph, 3) // PT_INTERP
		b = append(b, ph...)
	}
	noise := make([]byte, size)
	random := rand.NewChaCha8([32]byte{byte(machine)})
	_, _ = random.Read(noise)
	path := filepath.Join(t.TempDir(), "agent")
	if err := os.WriteFile(path, append(b, noise...), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

const x86, arm = 62, 183 // e_machine

func build(t *testing.T, args ...string) string {
	t.Helper()
	var out strings.Builder
	if err := run(context.Background(), args, &out, io.Discard); err != nil {
		t.Fatalf("run %q: %v", args, err)
	}
	return out.String()
}

// unpack reads a tar into a folder.
func unpack(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		target := filepath.Join(dir, filepath.FromSlash(h.Name))
		if h.Typeflag == tar.TypeDir {
			if err := os.MkdirAll(target, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(target, data, 0o644); err != nil {
			t.Fatalf("%s comes before its folder: %v", h.Name, err)
		}
		if hash, ok := strings.CutPrefix(h.Name, "blobs/sha256/"); ok {
			if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != hash {
				t.Errorf("%s holds something else", h.Name)
			}
		}
	}
}

func TestArchive(t *testing.T) {
	out := filepath.Join(t.TempDir(), "dist", "agent.tar")
	amd64 := program(t, x86, 100_000, false)
	printed := build(t, "--bin-amd64", amd64, "--bin-arm64", program(t, arm, 100_000, false), "--out", out, "--name", "culvert-agent:v1.2.3")
	dir := unpack(t, out)

	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := top.IndexManifest()
	if err != nil || len(manifest.Manifests) != 1 {
		t.Fatalf("index.json: %+v, %v", manifest, err)
	}
	desc := manifest.Manifests[0]
	if got := desc.Annotations["io.containerd.image.name"]; got != "docker.io/library/culvert-agent:v1.2.3" {
		t.Errorf("containerd would call it %q", got)
	}
	if got := desc.Annotations["org.opencontainers.image.ref.name"]; got != "v1.2.3" {
		t.Errorf("ref.name is %q", got)
	}
	index, err := top.ImageIndex(desc.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Errorf("index: %v", err)
	}
	if !strings.Contains(printed, desc.Digest.String()) || !strings.Contains(printed, "0.10 MB") {
		t.Errorf("printed:\n%s", printed)
	}
	inner, err := index.IndexManifest()
	if err != nil || len(inner.Manifests) != 2 {
		t.Fatalf("index: %+v, %v", inner, err)
	}
	for i, arch := range []string{"amd64", "arm64"} {
		m := inner.Manifests[i]
		if m.Platform == nil || m.Platform.OS != "linux" || m.Platform.Architecture != arch || !strings.Contains(printed, m.Digest.String()) {
			t.Errorf("manifest %d: %+v", i, m)
		}
		image, err := index.Image(m.Digest)
		if err != nil {
			t.Fatal(err)
		}
		checkImage(t, image, arch)
	}

	var docker []dockerManifest
	data, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err != nil || json.Unmarshal(data, &docker) != nil || len(docker) != 1 || docker[0].RepoTags[0] != "culvert-agent:v1.2.3" {
		t.Fatalf("manifest.json: %s, %v", data, err)
	}
	for _, path := range append(docker[0].Layers, docker[0].Config) {
		if _, err := os.Stat(filepath.Join(dir, path)); err != nil {
			t.Errorf("manifest.json: %v", err)
		}
	}
}

func checkImage(t *testing.T, image v1.Image, arch string) {
	t.Helper()
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c := config.Config
	if config.Architecture != arch || config.OS != "linux" || c.User != "65532:65532" || len(c.Entrypoint) != 1 || c.Entrypoint[0] != "/culvert-agent" {
		t.Errorf("%s configuration: %+v", arch, config)
	}
	if c.Labels["org.opencontainers.image.source"] != source || c.Labels["org.opencontainers.image.version"] != "v1.2.3" || c.Labels["org.opencontainers.image.licenses"] != "Apache-2.0" {
		t.Errorf("labels: %v", c.Labels)
	}
	modes := map[string]int64{}
	for r := tar.NewReader(mutate.Extract(image)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		modes[strings.TrimSuffix(h.Name, "/")] = h.Mode
		if h.Uid != 0 || h.Gid != 0 || h.ModTime.Unix() != 0 {
			t.Errorf("%s: owner %d:%d, time %v", h.Name, h.Uid, h.Gid, h.ModTime)
		}
		if h.Name == "etc/passwd" {
			if data, _ := io.ReadAll(r); !bytes.Contains(data, []byte(":65532:65532:")) {
				t.Errorf("passwd: %s", data)
			}
		}
	}
	if len(modes) != 4 || modes["culvert-agent"] != 0o755 || modes["etc"] != 0o755 || modes["etc/passwd"] != 0o644 || modes["etc/group"] != 0o644 {
		t.Errorf("files: %v", modes)
	}
}

func TestReproducible(t *testing.T) {
	amd64 := program(t, x86, 10_000, false)
	var tars [2][]byte
	for i := range tars {
		out := filepath.Join(t.TempDir(), "agent.tar")
		build(t, "--bin-amd64", amd64, "--out", out, "--name", "r.example/a/agent:1")
		var err error
		if tars[i], err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(tars[0], tars[1]) {
		t.Error("two builds of the same binary differ")
	}
}

func TestPush(t *testing.T) {
	server := httptest.NewServer(registry.New())
	defer server.Close()
	target := strings.TrimPrefix(server.URL, "http://") + "/team/culvert-agent:v1.2.3"
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	printed := build(t, "--bin-amd64", program(t, x86, 1000, false), "--bin-arm64", program(t, arm, 1000, false), "--push", target)
	ref, err := name.ParseReference(target)
	if err != nil {
		t.Fatal(err)
	}
	index, err := remote.Index(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	if digest, _ := index.Digest(); !strings.Contains(printed, "pushed "+target+"@"+digest.String()) {
		t.Errorf("printed:\n%s", printed)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		image, err := remote.Image(ref, remote.WithPlatform(v1.Platform{OS: "linux", Architecture: arch}))
		if err != nil {
			t.Fatal(err)
		}
		checkImage(t, image, arch)
	}
}

func TestRefusals(t *testing.T) {
	out := filepath.Join(t.TempDir(), "agent.tar")
	good := program(t, x86, 100, false)
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{
		"nothing to do":        {"--bin-amd64", good, "--name", "a:1"},
		"--name NAME:TAG":      {"--bin-amd64", good, "--out", out},
		"no binary":            {"--out", out, "--name", "a:1"},
		"image name":           {"--bin-amd64", good, "--out", out, "--name", "A B"},
		"not for arm64":        {"--bin-arm64", good, "--out", out, "--name", "a:1"},
		"CGO_ENABLED=0":        {"--bin-amd64", program(t, x86, 100, true), "--out", out, "--name", "a:1"},
		"not a Linux program":  {"--bin-amd64", text, "--out", out, "--name", "a:1"},
		"more than the":        {"--bin-amd64", program(t, x86, maxCompressed, false), "--out", out, "--name", "a:1"},
		"no such file":         {"--bin-amd64", out + ".none", "--out", out, "--name", "a:1"},
		"unexpected argument":  {"--out", out, "extra"},
		"pushing 127.0.0.1:1/": {"--bin-amd64", good, "--push", "127.0.0.1:1/a:1"},
	} {
		err := run(context.Background(), args, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("run %q: %v, want %q", args, err, want)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(out), "*")); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}
