{{- define "podtether.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* supervisor.toml. Texts, numbers, truths and lists of texts are written alike in TOML and JSON. */ -}}
{{- define "podtether.toml" -}}
{{- range $name, $tailnet := .Values.config.tailnet }}
[tailnet.{{ $name }}]
{{- range $key, $value := omit $tailnet "credentials" }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{ with $tailnet.credentials }}
[tailnet.{{ $name }}.credentials]
{{- range $key, $value := . }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{ end }}
{{- end }}
{{- range $name, $namespace := .Values.config.namespace }}
[namespace.{{ toJson $name }}]
{{- range $key, $value := $namespace }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{ end }}
[node]
{{- range $key, $value := .Values.config.node }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "podtether.cniDirs" -}}
{{- if .Values.cni.k3s -}}
- --cni-conf-dir=/var/lib/rancher/k3s/agent/etc/cni/net.d
- --cni-bin-dir=/var/lib/rancher/k3s/data/cni
- --cni-bin-dir=/var/lib/rancher/k3s/data/current/bin
{{- else -}}
- --cni-conf-dir={{ .Values.cni.confDir }}
- --cni-bin-dir={{ .Values.cni.binDir }}
{{- end -}}
{{- end -}}
