package machine

import (
	"reflect"
	"testing"
)

func TestParseHierarchies(t *testing.T) {
	got := parseHierarchies("9:name=systemd:/\n8:pids:/x\n2:cpu,cpuacct:/\n0::/unified\n\n")
	want := []hierarchy{{"systemd", "none,name=systemd"}, {"pids", "pids"}, {"cpu,cpuacct", "cpu,cpuacct"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestSpecRoundTrip(t *testing.T) {
	s := &Spec{
		Name: "node1", Group: "p-node1", Netns: "/run/netns/p-node1", Dir: t.TempDir(), Bin: "/bin", Share: []string{"/bin"},
		Files: map[string]string{"etc/hosts": "x"}, Node: true, Processes: []Process{{"a", []string{"a", "-x"}, "/sock"}},
	}
	if err := s.Save(); err != nil {
		t.Fatal(err)
	}
	got, err := Load(s.Path())
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, s) {
		t.Errorf("got %+v, want %+v", got, s)
	}
	if pid := Alive(s); pid != 0 {
		t.Errorf("a machine that never ran is alive as %d", pid)
	}
}
