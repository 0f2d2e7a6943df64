{{- define "sallyport.labels" -}}
app.kubernetes.io/name: sallyport
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sallyport.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* The name of the node is in no file: one configuration is that of all nodes. */ -}}
{{- define "sallyport.node" -}}
- {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
{{- end }}

{{- define "sallyport.agentSpec" -}}
{{- $spec := dict "trustDomain" .Values.trustDomain "stateDir" "/var/lib/sallyport/state" "workloadAPI" (printf "unix:///run/spire/sockets/%s" .Values.workloadAPI.socket) }}
{{- if .Values.cluster.enabled }}
{{- $_ := set $spec "kubernetes" dict }}
{{- end }}
{{- if .Values.collector.enabled }}
{{- $_ := set $spec "collector" (dict "address" (printf "sallyport-collector.%s.svc:9443" .Release.Namespace)) }}
{{- end }}
{{- toYaml (mergeOverwrite $spec (deepCopy .Values.agentConfig)) }}
{{- end }}

{{- /* Each file by itself: a directory of a ConfigMap is writable by everybody, and the agent obeys none that is. */ -}}
{{- define "sallyport.configMounts" -}}
- {name: config, mountPath: /etc/sallyport/agent.yaml, subPath: agent.yaml, readOnly: true}
{{- end }}

{{- define "sallyport.volumes" -}}
- {name: config, configMap: {name: sallyport}}
{{- if not .Values.cluster.enabled }}
- {name: resources, configMap: {name: sallyport-resources}}
{{- end }}
# What must be there when this pod is not: px, sockets and the proxy's policy.
- {name: run, hostPath: {path: {{ .Values.host.run }}, type: DirectoryOrCreate}}
# Records and used grants: they outlive pod and node.
- {name: state, hostPath: {path: {{ .Values.host.state }}, type: DirectoryOrCreate}}
# Pins: enforcement goes on by them while this pod is replaced.
- {name: bpffs, hostPath: {path: {{ .Values.host.bpffs }}, type: Directory}}
# The root of cgroup v2, which the backstop is attached to. A container sees its own part of it alone.
- {name: cgroup, hostPath: {path: {{ .Values.host.cgroup }}, type: Directory}}
# A state directory that was copied to another machine is found out by it.
- {name: machine-id, hostPath: {path: /etc/machine-id, type: File}}
# SPIRE may come later than this pod: then it is an empty directory.
- {name: workload-api, hostPath: {path: {{ .Values.workloadAPI.directory }}, type: DirectoryOrCreate}}
{{- end }}

{{- define "sallyport.agentMounts" -}}
{{ include "sallyport.configMounts" . }}
{{- if and (not .Values.cluster.enabled) .Values.resourcesPerNode }}
- {name: resources, mountPath: /etc/sallyport/resources.d/node.yaml, subPathExpr: $(NODE_NAME).yaml, readOnly: true}
{{- else if not .Values.cluster.enabled }}
{{- range $name, $_ := .Values.resources }}
- {name: resources, mountPath: /etc/sallyport/resources.d/{{ $name }}, subPath: {{ $name }}, readOnly: true}
{{- end }}
{{- end }}
- {name: state, mountPath: /var/lib/sallyport}
- {name: bpffs, mountPath: /sys/fs/bpf}
- {name: cgroup, mountPath: /host/cgroup, readOnly: true}
- {name: machine-id, mountPath: /etc/machine-id, readOnly: true}
- {name: workload-api, mountPath: /run/spire/sockets, readOnly: true}
{{- end }}
