package image

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("content"), 0o755); err != nil {
		t.Fatal(err)
	}
	i := Image{Name: "x.test/app:1", Entrypoint: []string{"/opt/x/p"}, User: "7:7", Files: []string{program + "=/opt/x/p", "->p=/opt/x/q"}}
	out := filepath.Join(dir, "i.tar")
	if err := i.Write(out); err != nil {
		t.Fatal(err)
	}
	again := filepath.Join(dir, "again.tar")
	if err := i.Write(again); err != nil {
		t.Fatal(err)
	}
	a, _ := os.ReadFile(out)
	b, _ := os.ReadFile(again)
	if !bytes.Equal(a, b) {
		t.Error("the same files gave two images")
	}

	tag, err := name.NewTag("x.test/app:1")
	if err != nil {
		t.Fatal(err)
	}
	img, err := tarball.ImageFromPath(out, &tag)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil || config.Config.User != "7:7" || config.Config.Entrypoint[0] != "/opt/x/p" {
		t.Errorf("config %+v, %v", config, err)
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]*tar.Header{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		found[h.Name] = h
	}
	for _, want := range []string{"tmp/", "etc/", "etc/passwd", "opt/", "opt/x/", "opt/x/p", "opt/x/q"} {
		if found[want] == nil {
			t.Errorf("no %s in the layer", want)
		}
	}
	if h := found["opt/x/q"]; h != nil && h.Linkname != "p" {
		t.Errorf("link leads to %q", h.Linkname)
	}
}

func TestBadFiles(t *testing.T) {
	for _, f := range []string{"nothing", "a=relative", "/does/not/exist=/x"} {
		if err := (Image{Name: "x.test/app:1", Files: []string{f}}).Write(filepath.Join(t.TempDir(), "i.tar")); err == nil {
			t.Errorf("%q was taken", f)
		}
	}
}
